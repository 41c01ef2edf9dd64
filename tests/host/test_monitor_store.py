"""The rules every store keeps, on both: duplicates, gaps, wills, quarantine, versions."""

import contextlib
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.contract.errors import MessageError
from device.contract.messages import Event, ModelState, Reply, Result, State, Telemetry
from device.contract.topics import DeviceId
from tests.support.stores import opened

CAMERA = DeviceId("greenhouse", "cam-1")
NEW_DEVICES = (DeviceId("greenhouse", f"new-{number}") for number in itertools.count())
FRESH_DEVICE = [HealthCheck.function_scoped_fixture]  # one store for all examples, but a device for each
MODEL = ModelState(name="vit", version="1.2.0", release=3, precision="int8", backbone="ab" * 32)


def birth(boot: str, **fields) -> State:
    return State(status="online", boot=boot, model=MODEL, labels=("healthy", "blight"), **fields)


def will(boot: str) -> State:
    return State(status="offline", boot=boot)


def telemetry(sequence: int, *, boot: str = "b1", time: float | None = None, **values: float) -> Telemetry:
    return Telemetry(boot=boot, sequence=sequence, time=time or 1000.0 + sequence, values=values or {"drift": 0.1})


def test_birth_and_telemetry_make_a_device(store):
    store.record_state(CAMERA, birth("b1"), received=10.0)
    assert store.record_telemetry(CAMERA, telemetry(1, drift=0.25), received=20.0)
    row = store.device(CAMERA)
    assert (row.status, row.boot, row.state.model, row.last_seen) == ("online", "b1", MODEL, 20.0)
    assert (row.latest, row.latest_time, row.received) == ({"drift": 0.25}, 1001.0, 1)
    assert store.devices() == [row]
    assert store.device(DeviceId("greenhouse", "cam-2")) is None


def test_an_old_message_does_not_replace_the_newest_values(store):
    store.record_telemetry(CAMERA, telemetry(2, drift=0.2), received=1.0)
    store.record_telemetry(CAMERA, telemetry(1, drift=0.1), received=2.0)
    assert store.device(CAMERA).latest == {"drift": 0.2}


def test_will_keeps_what_the_birth_said(store):
    store.record_state(CAMERA, birth("b1"), received=1.0)
    store.record_state(CAMERA, will("b1"), received=2.0)
    row = store.device(CAMERA)
    assert (row.status, row.state.model, row.last_seen) == ("offline", MODEL, 1.0)


def test_reconnecting_with_the_same_boot_is_online_again(store):
    for state in (birth("b1"), will("b1"), birth("b1")):
        store.record_state(CAMERA, state, received=1.0)
    assert store.device(CAMERA).status == "online"


def test_late_will_of_a_boot_never_seen_is_ignored(store):
    store.record_state(CAMERA, birth("b2"), received=1.0)
    store.record_state(CAMERA, will("b1"), received=2.0)
    assert (store.device(CAMERA).status, store.device(CAMERA).boot) == ("online", "b2")


@given(
    st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), unique=True))),
    st.randoms(),
)
@settings(max_examples=15, deadline=None, suppress_health_check=FRESH_DEVICE)
def test_no_will_of_an_older_boot_hides_a_newer_birth(store, boots_and_wills, random):
    device = next(NEW_DEVICES)
    boots, wills = boots_and_wills
    arrivals = [birth(f"b{i}") for i in range(boots)]
    for i in wills:  # a will arrives anywhere after its own birth
        position = random.randint(next(k for k, s in enumerate(arrivals) if s == birth(f"b{i}")) + 1, len(arrivals))
        arrivals.insert(position, will(f"b{i}"))
    with store.transaction():
        for state in arrivals:
            store.record_state(device, state, received=1.0)
    row = store.device(device)
    assert row.boot == f"b{boots - 1}"
    assert row.status == ("offline" if boots - 1 in wills else "online")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
@settings(max_examples=25, deadline=None, suppress_health_check=FRESH_DEVICE)
def test_counts_are_exact_in_any_order_with_losses_and_copies(store, arrivals):
    device = next(NEW_DEVICES)
    with store.transaction([device]):
        store.record_telemetry(device, telemetry(1, boot="earlier"), received=0.0)
        new = [store.record_telemetry(device, telemetry(sequence), received=1.0) for sequence in arrivals]
    row, gaps = store.device(device), store.gaps(device)
    assert sum(new) == len(set(arrivals)) == row.received - 1
    assert row.duplicates == len(arrivals) - len(set(arrivals))
    missing = set(range(1, max(arrivals) + 1)) - set(arrivals)
    assert row.missing == len(missing) == sum(gap.missing for gap in gaps)
    assert all(missing & set(range(gap.first, gap.last + 1)) for gap in gaps if gap.closed is None)
    assert not any(missing & set(range(gap.first, gap.last + 1)) for gap in gaps if gap.closed is not None)


def test_gap_is_closed_by_the_late_message(store):
    for sequence, received in ((1, 1.0), (4, 2.0), (2, 3.0)):
        store.record_telemetry(CAMERA, telemetry(sequence), received=received)
    (gap,) = store.gaps(CAMERA)
    assert (gap.first, gap.last, gap.missing, gap.opened, gap.closed) == (2, 3, 1, 2.0, None)
    store.record_event(CAMERA, Event(kind="drift", boot="b1", sequence=3, time=1.0, data={}), received=9.0)
    (gap,) = store.gaps(CAMERA)
    assert (gap.missing, gap.closed, store.device(CAMERA).missing) == (0, 9.0, 0)


def test_messages_before_the_store_knew_the_device_are_told_apart(store):
    store.record_telemetry(CAMERA, telemetry(500), received=1.0)
    store.record_telemetry(CAMERA, telemetry(3, boot="b2"), received=2.0)
    row = store.device(CAMERA)
    assert (row.unwatched, row.missing) == (499, 2)
    assert [gap.watched for gap in store.gaps(CAMERA)] == [True, False]


def test_a_number_used_twice_for_different_messages_is_an_error(store):
    store.record_telemetry(CAMERA, telemetry(1, drift=0.1), received=1.0)
    with pytest.raises(MessageError, match="sequence 1 of boot 'b1' was already used"):
        store.record_telemetry(CAMERA, telemetry(1, drift=0.2), received=2.0)
    assert store.device(CAMERA).duplicates == 0


def test_quarantine_is_bounded_counted_and_merges_copies(store):
    with store.transaction():
        for i in range(150):
            store.quarantine("a/b", b"%d" % i + b"x" * 5000, "not JSON", received=float(i), device=CAMERA)
    store.quarantine("a/b", b"149" + b"x" * 5000, "not JSON", received=200.0, device=CAMERA)
    store.quarantine("\ud800", b"", "no topic", received=300.0)
    kept = store.quarantined(CAMERA)
    assert len(kept) == 100
    assert (kept[0].seen, kept[0].last_seen, kept[0].payload_bytes, len(kept[0].payload)) == (2, 200.0, 5003, 4096)
    assert store.quarantined_total() == 152
    assert store.quarantined()[0].reason == "no topic"
    assert store.devices() == []  # what cannot be read makes no device


def test_a_record_that_fails_in_a_batch_leaves_the_others(store):
    with store.transaction():
        store.record_telemetry(CAMERA, telemetry(1), received=1.0)
        with pytest.raises(ValueError, match="JSON"):
            store.record_event(
                CAMERA, Event(kind="error", boot="b1", sequence=2, time=1.0, data={"x": 1e999}), received=1
            )
        store.record_telemetry(CAMERA, telemetry(3), received=1.0)
    assert (store.device(CAMERA).received, store.device(CAMERA).missing) == (2, 1)


def test_an_aborted_transaction_leaves_nothing(store):
    with contextlib.suppress(KeyError), store.transaction():
        store.record_telemetry(CAMERA, telemetry(1), received=1.0)
        raise KeyError
    assert store.devices() == []


def test_replayed_birth_proves_no_life(store):
    store.record_state(CAMERA, birth("b1", time=50.0), received=900.0, retained=True)
    assert store.device(CAMERA).last_seen == 50.0


def test_replies_and_results_are_bounded(store):
    with store.transaction():
        for i in range(250):
            store.record_result(CAMERA, Result(frame_id=str(i), label="x", confidence=0.5, time=1.0), received=1.0)
            store.record_reply(CAMERA, Reply(id=str(i), ok=True), received=1.0)
    for table in ("result", "reply"):
        (row,) = store._database.read(f"SELECT count(*) AS kept FROM {table}")
        assert row["kept"] == 200


def test_timelines_thin_keep_the_worst_and_show_silence(store):
    with store.transaction():
        for i in range(1, 1001):
            time = 10.0 * i + (5000 if i > 500 else 0)
            values = {"latency/p99": 9.0 if i == 700 else 0.1, "latency/p50": 0.05}
            store.record_telemetry(CAMERA, telemetry(i, time=time, **values), received=1.0)
    series = store.telemetry(CAMERA, ("latency/p50", "latency/p99", "drift"), since=0, until=15000, points=150)
    assert series.values.keys() == {"latency/p50", "latency/p99"}
    assert len(series.times) < 200
    assert series.times == sorted(series.times)
    p99 = series.values["latency/p99"]
    assert p99.count(None) == 1
    assert max(v for v in p99 if v is not None) == 9.0


def test_class_mix_adds_up_the_windows(store):
    for i in (1, 2, 3):
        store.record_telemetry(CAMERA, telemetry(i, **{"class/0": 5.0, "class/12": 1.0, "drift": 0.5}), received=1.0)
    assert store.class_mix(CAMERA, since=1001.5, until=2000) == {"0": 10.0, "12": 2.0}


def test_events_come_newest_first(store):
    for i, kind in ((1, "installed"), (2, "confirmed")):
        store.record_event(CAMERA, Event(kind=kind, boot="b1", sequence=i, time=float(i), data={"n": i}), received=7.0)
    assert [(row.event.kind, row.event.data, row.received) for row in store.events(CAMERA)] == [
        ("confirmed", {"n": 2}, 7.0),
        ("installed", {"n": 1}, 7.0),
    ]


def test_reopening_keeps_everything(store_name):
    with opened(store_name) as first:
        first.record_telemetry(CAMERA, telemetry(1), received=1.0)
    with opened(store_name) as again:
        assert (again.identity, again.device(CAMERA).received) == (first.identity, 1)
        assert not again.record_telemetry(CAMERA, telemetry(1), received=2.0)


def test_what_no_database_takes_is_refused_before_anything_is_written(store):
    bad = [telemetry(1, time=float("nan")), telemetry(0), telemetry(2**53 + 1)]
    with store.transaction([CAMERA]):
        for message in bad:
            with pytest.raises(MessageError, match="cannot be stored"):
                store.record_telemetry(CAMERA, message, received=1.0)
        store.record_reply(CAMERA, Reply(id="nul \0, half a pair \ud800, long" + "x" * 9000, ok=True), received=1.0)
        store.quarantine("a\0b", b"\0", "why\0", received=2.0)
    assert store.device(CAMERA).received == 0
    assert [row.topic for row in store.quarantined()] == ["a\\x00b"]


def test_a_device_seen_first_in_a_batch_is_one_device(store):
    others = [DeviceId("greenhouse", f"cam-{n}") for n in range(3)]
    with store.transaction(others[:2]):
        for device in (*others, *others):
            store.record_state(device, birth("b1"), received=1.0)
            store.record_state(device, birth("b2"), received=2.0)
            store.record_state(device, will("b1"), received=3.0)
    assert [(row.device, row.boot, row.status) for row in store.devices()] == [(d, "b2", "online") for d in others]
