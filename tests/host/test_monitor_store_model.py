"""Both stores against a plain model in memory: any interleaving of messages, copies, boots, retention and spans."""

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.contract.errors import MessageError
from device.contract.messages import Event, State, Telemetry
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.aggregates import Aggregate, put_together
from host.monitor.retention import DAY_S, Retention
from host.monitor.store import Store, open_store
from tests.support.postgres import PostgresServer, forgetful_server
from tests.support.stores import opened

CAMERAS = [DeviceId("lab", f"cam-{n}") for n in range(2)]
RETENTION = Retention(telemetry_days=1, minutes_days=2, hours_days=4)
DAYS = {"telemetry": 1.0, "event": 4.0}


@dataclass
class Model:
    """Every message of one device that ever arrived, in lists and sets; nothing is rolled up."""

    arrived: dict[str, set[int]] = field(default_factory=dict)
    kept: dict[tuple[str, int], tuple] = field(default_factory=dict)  # (kind, time, body) and arrival
    windows: list[tuple[float, float, dict]] = field(default_factory=list)  # time, arrival, values
    duplicates: int = 0

    def record(self, message: Telemetry | Event, received: float) -> bool | None:
        """True for a new one, False for a copy, None for a number used twice."""
        numbers = self.arrived.setdefault(message.boot, set())
        is_telemetry = isinstance(message, Telemetry)
        said = message.values if is_telemetry else message.data
        content = ("telemetry" if is_telemetry else "event", message.time, said)
        kept = self.kept.get((message.boot, message.sequence))
        if message.sequence in numbers:
            if kept is not None and kept[0] != content:
                return None
            self.duplicates += 1
            return False
        numbers.add(message.sequence)
        self.kept[message.boot, message.sequence] = content, received
        if is_telemetry:
            self.windows.append((message.time, received, message.values))
        return True

    def forget(self, now: float) -> None:
        self.kept = {
            key: (content, received)
            for key, (content, received) in self.kept.items()
            if received >= now - DAYS[content[0]] * DAY_S
        }

    @property
    def missing(self) -> int:
        return sum(max(numbers) - len(numbers) for numbers in self.arrived.values() if numbers)


@st.composite
def messages(draw):
    """A message of one of two devices; numbers are few, so that copies, gaps and conflicts are many."""
    boot, sequence = draw(st.sampled_from(["b1", "b2"])), draw(st.integers(1, 8))
    moment = draw(st.sampled_from([0.0, 59.0, 60.0, 3599.0, 3600.0, 90000.0])) + draw(st.integers(0, 2))
    if draw(st.booleans()):
        values = {"frames": 4.0, "latency/p50": 2.0, "latency/p99": float(sequence), "drift": 1.0, "class/3": 4.0}
        return Telemetry(boot=boot, sequence=sequence, time=moment, values=values)
    return Event(kind="drift", boot=boot, sequence=sequence, time=moment, data={"n": sequence})


COMMIT, FORGET = "commit", "forget"
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(CAMERAS), messages()),
        st.tuples(st.sampled_from(CAMERAS), messages()),
        st.sampled_from([COMMIT, FORGET]),
    ),
    max_size=30,
)


@given(steps)
@settings(max_examples=8, deadline=None)
def test_both_stores_hold_what_a_plain_model_holds(postgres, tmp_path_factory, steps):
    hold_what_the_model_holds(postgres, tmp_path_factory, steps)


@pytest.mark.slow
@given(steps)
@settings(max_examples=600, deadline=None)
def test_both_stores_hold_what_a_plain_model_holds_at_length(postgres, tmp_path_factory, steps):
    hold_what_the_model_holds(postgres, tmp_path_factory, steps)


def hold_what_the_model_holds(postgres, tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("model") / "s.sqlite"
    with opened(path) as first, opened(postgres.url()) as second:
        models = {camera: Model() for camera in CAMERAS}
        now = play(steps, [first, second], models)
        for camera, model in models.items():
            assert rows(first, camera) == rows(second, camera)
            compare(first, camera, model, now)


def play(steps: list, stores: list[Store], models: dict[DeviceId, Model]) -> float:
    """Do the steps in batches, a quarter of a day apart; returns the time after the last."""
    now = 0.0
    for step, batch in itertools.groupby(steps, key=lambda step: step if isinstance(step, str) else None):
        now += DAY_S / 4
        if step == FORGET:
            for store in stores:
                store.forget(RETENTION, now=now)
            for model in models.values():
                model.forget(now)
        elif step is None:
            batch = list(batch)
            answers = [[answer(store, *item, now) for item in batch] for store in transactions(stores)]
            expected = [models[camera].record(message, now) for camera, message in batch]
            assert answers == [expected] * len(stores)
    return now


def transactions(stores: list[Store]) -> Iterator[Store]:
    for store in stores:
        with store.transaction(CAMERAS):
            yield store


def answer(store: Store, camera: DeviceId, message: Telemetry | Event, now: float) -> bool | None:
    record = store.record_telemetry if isinstance(message, Telemetry) else store.record_event
    try:
        return record(camera, message, received=now)
    except MessageError:
        return None


SPANS = [(0.0, 90005.0), (0.0, 3600.0), (59.0, 61.0), (30.0, 90001.0), (-1e6, 1e6), (3600.0, 3600.5)]


def rows(store: Store, camera: DeviceId) -> list:
    """All that a store answers of a device."""
    names = ("latency/p50", "latency/p99", "drift")
    return [
        store.device(camera),
        store.gaps(camera),
        store.events(camera),
        *(store.telemetry(camera, names, since=since, until=until) for since, until in SPANS),
        *(store.class_mix(camera, since=since, until=until) for since, until in SPANS),
    ]


def compare(store: Store, camera: DeviceId, model: Model, now: float) -> None:
    row = store.device(camera)
    if row is None:
        assert not any(model.arrived.values())
        return
    assert row.received == sum(map(len, model.arrived.values()))
    assert row.duplicates == model.duplicates
    assert row.missing + row.unwatched == model.missing == sum(gap.missing for gap in store.gaps(camera))
    events = {(event.event.boot, event.event.sequence) for event in store.events(camera, limit=1000)}
    assert events == {key for key, (content, _) in model.kept.items() if content[0] == "event"}
    if all(received >= now - RETENTION.telemetry_days * DAY_S for _, received, _ in model.windows):
        for since, until in SPANS:  # all is there as it came, so every span must give exactly what lies in it
            inside = [Aggregate.of(time, values) for time, _, values in model.windows if since <= time <= until]
            assert store.class_mix(camera, since=since, until=until) == put_together(inside).classes()
            peak = max((window.shown()["latency/p99"] for window in inside), default=None)
            assert worst(store, camera, since, until) == peak
    total = sum(values["class/3"] for _, received, values in model.windows)
    oldest = min((received for _, received, _ in model.windows), default=math.inf)
    if oldest >= now - RETENTION.hours_days * DAY_S:  # hours still hold all, whatever else is forgotten
        assert store.class_mix(camera, since=-1e7, until=1e7).get("3", 0.0) == total


def worst(store: Store, camera: DeviceId, since: float, until: float) -> float | None:
    series = store.telemetry(camera, ("latency/p99",), since=since, until=until)
    return max((value for value in series.values.get("latency/p99", []) if value is not None), default=None)


WRITER = """
import random, sys
from device.contract.messages import Event, Telemetry
from device.contract.topics import DeviceId
from host.monitor.store import open_store

name, seed, messages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cameras = [DeviceId("lab", f"cam-{n}") for n in range(4)]
store, rng = open_store(name), random.Random(seed)
todo = [(camera, n) for camera in cameras for n in range(1, messages + 1) if n % 10]  # every tenth was lost
rng.shuffle(todo)
for i in range(0, len(todo), 20):
    batch = todo[i : i + 20]
    with store.transaction(camera for camera, _ in batch):
        for camera, n in batch:
            values = {"frames": 1.0, "class/0": 1.0}
            store.record_telemetry(
                camera, Telemetry(boot="b1", sequence=n, time=10.0 * n, values=values), received=1.0
            )
store.close()
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_processes_write_the_same_messages_of_the_same_devices(kind, request, tmp_path):
    name = tmp_path / "s.sqlite" if kind == "sqlite" else request.getfixturevalue("postgres").url()
    messages = 100
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(name), str(seed), str(messages)], stderr=subprocess.PIPE)
        for seed in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
    there = messages * 9 // 10
    with opened(name) as store:
        for camera in [DeviceId("lab", f"cam-{n}") for n in range(4)]:
            row = store.device(camera)
            assert (row.received, row.duplicates) == (there, there)
            assert row.missing + row.unwatched == messages // 10 - 1  # nobody knows of the last lost one
            assert store.class_mix(camera, since=0, until=1e6) == {"0": there}
            left = [gap for gap in store.gaps(camera, limit=1000) if gap.missing]
            assert sum(gap.missing for gap in left) == messages // 10 - 1


def test_a_lost_server_is_an_error_and_the_next_call_connects_again(postgres):
    message = Telemetry(boot="b1", sequence=1, time=1.0, values={"frames": 1.0})
    with forgetful_server() as server, opened(server.url()) as store:
        store.record_telemetry(CAMERAS[0], message, received=1.0)
        with pytest.raises(MonitorError, match="so nothing is written"):
            record_while_it_restarts(store, server, message)
        with pytest.raises(MonitorError, match="cannot be read"):
            store.devices()  # the reader's connection was lost, too
        assert [row.device for row in store.devices()] == CAMERAS[:1]
        assert store.record_telemetry(CAMERAS[1], message, received=4.0)
        assert not store.record_telemetry(CAMERAS[1], message, received=4.0)
        server.stop()
        with pytest.raises(MonitorError, match="postgresql://fieldvit@/postgres: cannot be"):
            store.record_telemetry(CAMERAS[1], message, received=5.0)
        server.start()
        with store.transaction():
            with pytest.raises(MonitorError, match="cannot be read"):
                store.devices()  # which does not touch what is being written
            assert not store.record_telemetry(CAMERAS[1], message, received=6.0)
        assert store.device(CAMERAS[1]).duplicates == 2


def record_while_it_restarts(store: Store, server: PostgresServer, message: Telemetry) -> None:
    with store.transaction(CAMERAS):
        store.record_telemetry(CAMERAS[1], message, received=2.0)
        server.stop()
        with contextlib.suppress(MonitorError):
            store.quarantine("t", b"", "why", received=2.0)
        server.start()
        store.record_state(CAMERAS[1], State(status="offline", boot="b1"), received=3.0)  # on no new connection


def test_a_writer_that_dies_leaves_the_device_to_others(postgres):
    name = postgres.url()
    script = (
        "import sys, time\nfrom device.contract.topics import DeviceId\nfrom host.monitor.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "with store.transaction([DeviceId('lab', 'cam-0')]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, name], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    start = time.monotonic()
    with opened(name) as store:
        assert store.record_telemetry(CAMERAS[0], Telemetry(boot="b", sequence=1, time=1.0, values={}), received=1.0)
    assert time.monotonic() - start < 20


def test_a_server_that_is_not_there_is_named_without_secrets(tmp_path, monkeypatch):
    pytest.importorskip("psycopg")
    monkeypatch.setenv("PGPASSWORD", "secret-1")
    with pytest.raises(MonitorError, match=r"postgresql://me@127\.0\.0\.1:1/fleet: cannot be read") as caught:
        open_store("postgresql://me@127.0.0.1:1/fleet")
    for url in ("postgresql://me:secret-1@h/d", "postgresql://me@h/d?password=secret-1"):
        with pytest.raises(MonitorError, match=r"put it in ~/\.pgpass") as refused:
            open_store(url)
        assert "secret-1" not in str(refused.value)
    assert "secret-1" not in str(caught.value)


def test_foreign_and_newer_databases_are_refused(postgres):
    psycopg = pytest.importorskip("psycopg")
    newer, foreign, half = postgres.url(), postgres.url(), postgres.url()
    open_store(newer).close()
    for url, sql in (
        (newer, "UPDATE meta SET value = '7' WHERE key = 'schema'"),
        (foreign, "CREATE TABLE device (x int)"),
        (half, "CREATE TABLE meta (x int)"),
    ):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql)
    for url, message in ((newer, "schema 7 is newer"), (foreign, "something else"), (half, "something else")):
        with pytest.raises(MonitorError, match=message):
            open_store(url)
