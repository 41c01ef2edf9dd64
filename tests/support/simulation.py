"""A simulated fleet beside the monitor's own ingest and store, and whether the store holds what the boards' report says."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho

from device.contract.messages import Command, Reply, decode_reply, encode_command
from device.contract.topics import DeviceId, parse_topic
from host.monitor.broker import BrokerAddress
from host.monitor.ingest import Ingest
from host.monitor.store import Store, open_store
from host.simulate.config import SimulationConfig, Timing
from host.simulate.run import run_simulation
from tests.support.patience import PATIENCE

QUICK = Timing(
    frames_per_s=150.0, selftest_s=0.2, boot_s=0.3, soak_s=0.6, backoff_s=(0.05, 0.5), transfer_bytes_per_s=1e6
)
"""Boards that need tenths of seconds for what takes real ones minutes; frames enough for a drift value in each window."""


@dataclass
class Watched:
    """A store that an ingest fills."""

    path: Path
    store: Store
    ingest: Ingest

    def numbers(self) -> dict[tuple[str, str], set[int]]:
        """The sequence numbers that are stored, by device and boot."""
        query = (
            "SELECT device.device, boot.boot, sequence FROM message"
            " JOIN boot ON boot.id = message.boot_id JOIN device ON device.id = message.device_id"
        )
        found: dict[tuple[str, str], set[int]] = {}
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as database:
            for device, boot, sequence in database.execute(query):
                found.setdefault((device, boot), set()).add(sequence)
        return found

    def count(self) -> int:
        return sum(map(len, self.numbers().values()))

    def windows(self, device: str) -> list[str]:
        """The telemetry of a device, as it is stored, in the order of its numbers."""
        query = (
            "SELECT body FROM message JOIN device ON device.id = message.device_id"
            " WHERE device.device = ? AND kind = 'telemetry' ORDER BY sequence"
        )
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as database:
            return [body for (body,) in database.execute(query, (device,))]


@contextmanager
def watching(broker: BrokerAddress, directory: Path) -> Iterator[Watched]:
    """Run an ingest into a SQLite store in `directory`."""
    path = directory / "monitor.sqlite"
    store = open_store(path)
    ingest = Ingest(store, broker)
    ingest.start()
    try:
        yield Watched(path, store, ingest)
    finally:
        ingest.stop()
        store.close()


@dataclass
class Running:
    """A simulation in a thread."""

    thread: threading.Thread
    stop: threading.Event
    outcome: list[Any] = field(default_factory=list)

    def end(self, timeout_s: float = 40) -> dict[str, Any]:
        """Stop it and return its report, or raise what it raised."""
        self.stop.set()
        self.thread.join(timeout_s * PATIENCE)
        assert self.outcome, "the simulation does not end"
        if isinstance(self.outcome[0], BaseException):
            raise self.outcome[0]
        return self.outcome[0]


@contextmanager
def simulating(config: SimulationConfig, broker: BrokerAddress) -> Iterator[Running]:
    """Run a simulation that speaks to this broker until `end` is called, or the block ends."""
    stop = threading.Event()

    def run() -> None:
        try:
            running.outcome.append(run_simulation(config, broker=str(broker), stop=stop))
        except BaseException as error:
            running.outcome.append(error)

    running = Running(threading.Thread(target=run, name="simulation"), stop)
    running.thread.start()
    try:
        yield running
    finally:
        stop.set()
        running.thread.join(40 * PATIENCE)


@dataclass
class Operator:
    """Sends commands to boards, and collects every reply of theirs."""

    client: paho.Client
    site: str
    replies: dict[tuple[str, str], list[Reply]] = field(default_factory=dict)

    def send(self, device: str, command_id: str, verb: str, *, expires_s: float = 120.0, **arguments: Any) -> None:
        command = Command(id=command_id, verb=verb, expires=time.time() + expires_s, arguments=arguments)
        self.send_bytes(device, encode_command(command))

    def send_bytes(self, device: str, payload: bytes) -> None:
        self.client.publish(DeviceId(self.site, device).topic("command"), payload, qos=1)

    def reply(self, device: str, command_id: str, timeout_s: float = 15) -> Reply:
        wait_until(lambda: (device, command_id) in self.replies, timeout_s)
        return self.replies[device, command_id][0]

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        device, _ = parse_topic(message.topic)
        reply = decode_reply(message.payload)
        self.replies.setdefault((device.device, reply.id), []).append(reply)


@contextmanager
def operating(broker: BrokerAddress, site: str) -> Iterator[Operator]:
    """Connect an operator of a site."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    operator, subscribed = Operator(client, site), threading.Event()
    client.on_message = operator._on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect(broker.hostname, broker.port)
    client.subscribe(f"fieldvit/v1/{site}/+/reply", qos=1)
    client.loop_start()
    try:
        assert subscribed.wait(10 * PATIENCE)
        yield operator
    finally:
        client.disconnect()
        client.loop_stop()


def wait_until(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.05)


def require_all_stored(watched: Watched, report: dict[str, Any], *, timeout_s: float = 30) -> None:
    """Assert that the store holds what was acknowledged, nothing else, and gaps where numbers were dropped.

    A number that was sent, never acknowledged and then dropped may have arrived; `FaultPlan` avoids such, a reboot may not.
    """
    acknowledged = report["totals"]["acknowledged"]
    wait_until(lambda: watched.count() >= acknowledged, timeout_s)
    watched.ingest.stop()
    stored, rows = watched.numbers(), {row.device.device: row for row in watched.store.devices()}
    assert set(rows) == set(report["boards"])
    for name, board in report["boards"].items():
        missing = 0
        for boot in board["boots"]:
            have = stored.pop((name, boot["boot"]), set())
            known, dropped, sent = (_numbers(boot[key]) for key in ("acknowledged", "dropped", "sent"))
            assert known <= have <= known | (sent & dropped), (name, boot)
            assert known | dropped == set(range(1, boot["last"] + 1)), (name, boot)
            missing += len(set(range(1, max(have, default=0))) - have)
        row = rows[name]
        assert row.missing + row.unwatched == missing, (name, row)
        assert sum(gap.missing for gap in watched.store.gaps(row.device)) == missing
    assert not stored, "messages of boards or boots that nobody reported"
    assert watched.store.quarantined_total() == 0


def _numbers(spans: list[list[int]]) -> set[int]:
    return {number for first, last in spans for number in range(first, last + 1)}
