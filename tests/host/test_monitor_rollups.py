"""Rollups and retention: what is put together agrees with what it was made of, and what is forgotten stays counted."""

import itertools
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.contract.messages import UNITS, Event, Telemetry
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.aggregates import Aggregate, put_together, shown_as
from host.monitor.retention import DAY_S, Forgotten, Retention, forgetting
from host.monitor.spans import AS_IT_CAME, FINEST_UP_TO_S, HOUR, MINUTE, choose_width, pieces
from host.monitor.sql_queries import MAX_ROWS
from tests.support.stores import opened

CAMERA = DeviceId("greenhouse", "cam-1")
BEGIN = 1_700_000_000.0
NAMES = (*UNITS, "class/0", "class/17")

whole = st.integers(0, 1000).map(float)  # sums of whole numbers are exact, so any order may be compared exactly
windows = st.tuples(whole, st.dictionaries(st.sampled_from(NAMES), whole, max_size=8))


@given(windows)
def test_one_window_is_shown_as_it_came(window):
    aggregate = Aggregate.of(*window)
    assert aggregate.shown() == pytest.approx(window[1])
    assert (aggregate.time, Aggregate.load(aggregate.names, aggregate.numbers)) == (window[0], aggregate)


@given(st.lists(windows, min_size=1, max_size=12, unique_by=lambda window: window[0]), st.randoms(), st.integers(0, 12))
def test_windows_give_the_same_in_any_order_and_grouping(all_windows, random, cut):
    expected = put_together(Aggregate.of(*window) for window in all_windows)
    random.shuffle(all_windows)
    groups = [all_windows[:cut], all_windows[cut:]]
    parts = [put_together(Aggregate.of(*window) for window in group) for group in groups]
    assert put_together(Aggregate.load(part.names, part.numbers) for part in parts) == expected


def test_each_kind_of_value_has_its_rule():
    first = {"frames": 9.0, "latency/p50": 1.0, "latency/p99": 5.0, "confidence": 0.5, "temperature": 50.0}
    first |= {"throughput": 1.0, "learned/version": 1.0, "errors/unreadable": 1.0, "class/2": 9.0}
    second = {"frames": 1.0, "latency/p50": 11.0, "latency/p99": 3.0, "confidence": 1.0, "temperature": 40.0}
    second |= {"throughput": 3.0, "learned/version": 2.0, "errors/unreadable": 2.0, "class/2": 1.0}
    both = put_together([Aggregate.of(20.0, second), Aggregate.of(10.0, first)])
    assert both.shown() == {
        "frames": 10.0,
        "latency/p50": 2.0,
        "latency/p99": 5.0,
        "confidence": 0.55,
        "temperature": 50.0,
        "throughput": 2.0,
        "learned/version": 2.0,
        "errors/unreadable": 3.0,
        "class/2": 10.0,
    }
    assert both.layout.gauges == ("learned/version", "temperature", "throughput")
    assert (both.added[-6:-3], both.added[-3:]) == ([2, 2, 2], [3.0, 90.0, 4.0])
    assert (both.highest, both.lowest) == ([5.0, 2.0, 50.0, 3.0], [1.0, 40.0, 1.0])
    assert (both.last, both.last_times) == ([2.0, 40.0, 3.0], [20.0, 20.0, 20.0])
    assert (shown_as("latency/p50"), shown_as("latency/p99")) == ("frame-weighted mean", "maximum")
    assert (both.time, both.classes()) == (15.0, {"2": 10.0})


times = st.integers(-10_000, 400_000).map(float)
kept = st.fixed_dictionaries({AS_IT_CAME: times, MINUTE: times, HOUR: st.just(-math.inf)})


@given(times, st.integers(0, 300_000), kept, st.sampled_from([AS_IT_CAME, MINUTE, HOUR]))
def test_pieces_cover_a_span_once_and_what_is_kept_exactly(since, length, kept_since, width_s):
    until = since + length
    found = pieces(since, until, width_s, kept_since)
    assert all(before.until == after.since for before, after in itertools.pairwise(found))
    assert all(piece.since < piece.until and piece.width_s <= width_s for piece in found)
    assert all(piece.since % piece.width_s == 0 == piece.until % piece.width_s for piece in found if piece.width_s)
    if length == 0:
        assert not found
        return
    assert found[0].since <= since
    assert found[-1].until >= until
    assert since - found[0].since < HOUR
    assert found[-1].until - until < HOUR
    if width_s and since >= max(kept_since.values()):
        assert (found[0].since, found[-1].until) == (since, until)
        assert sum(piece.until - piece.since for piece in found if piece.width_s < width_s) < 2 * width_s


@given(times, st.floats(1, 1e7), kept)
def test_a_span_is_read_by_rows_that_are_there(since, seconds, kept_since):
    width_s = choose_width(seconds, since, kept_since)
    assert since >= kept_since[width_s]
    assert seconds <= FINEST_UP_TO_S[width_s]


def fill(store, *, seconds: float, every_s: float = 60.0, begin: float = BEGIN) -> list[Telemetry]:
    """A device's messages over so long a time, received as they were sent."""
    sent = []
    for n in range(1, int(seconds / every_s) + 1):
        moment = begin + n * every_s
        values = {"frames": 2.0, "latency/p50": float(n % 7), "latency/p99": float(n % 101), "class/0": float(n % 3)}
        sent.append(Telemetry(boot="b1", sequence=n, time=moment, values=values))
    for i in range(0, len(sent), 500):
        with store.transaction([CAMERA]):
            for message in sent[i : i + 500]:
                store.record_telemetry(CAMERA, message, received=message.time)
    return sent


def test_timelines_of_every_width_agree_with_the_messages(store):
    sent = fill(store, seconds=8 * 86400, every_s=600)
    for days, width_s in ((0.2, 0), (2.0, MINUTE), (7.5, HOUR)):
        since, until = BEGIN + 0.25 * 86400 + 7, BEGIN + (0.25 + days) * 86400 + 11
        inside = [message for message in sent if since <= message.time <= until]
        series = store.telemetry(CAMERA, ("frames", "latency/p50", "latency/p99"), since=since, until=until, points=200)
        slot_s = series.resolution_s
        assert (slot_s % HOUR if width_s == HOUR else slot_s % MINUTE if width_s else slot_s) == 0
        slots: dict[float, list[Telemetry]] = {}
        for message in inside:
            slots.setdefault(message.time // slot_s if slot_s else message.time, []).append(message)
        assert len(series.times) == len(slots)
        rows = list(slots.values())
        assert series.values["frames"] == [2.0 * len(row) for row in rows]
        assert series.values["latency/p99"] == [max(m.values["latency/p99"] for m in row) for row in rows]
        means = [sum(m.values["latency/p50"] for m in row) / len(row) for row in rows]
        assert series.values["latency/p50"] == pytest.approx(means)
        assert series.times == pytest.approx([sum(m.time for m in row) / len(row) for row in rows])
        mix = store.class_mix(CAMERA, since=since, until=until)
        assert mix == {"0": sum(message.values["class/0"] for message in inside)}


def test_many_messages_in_a_short_span_are_read_by_minute(store, monkeypatch):
    monkeypatch.setattr("host.monitor.sql_queries.MAX_ROWS", 100)
    sent = fill(store, seconds=3600, every_s=5)
    assert MAX_ROWS > 3600
    series = store.telemetry(CAMERA, ("frames",), since=BEGIN, until=BEGIN + 3600)
    assert series.resolution_s == MINUTE
    assert sum(series.values["frames"]) == 2.0 * len(sent)


def test_a_late_message_is_in_the_rollup_of_its_minute(store):
    fill(store, seconds=10 * 86400, every_s=1800)
    before = store.class_mix(CAMERA, since=BEGIN, until=BEGIN + 10 * 86400)
    late = Telemetry(boot="b1", sequence=9999, time=BEGIN + 90000, values={"class/0": 100.0})
    assert store.record_telemetry(CAMERA, late, received=BEGIN + 11 * 86400)
    after = store.class_mix(CAMERA, since=BEGIN, until=BEGIN + 10 * 86400)
    assert after["0"] == before["0"] + 100


def test_what_is_forgotten_is_still_known_and_still_drawn(store_name):
    with opened(store_name) as store:
        store.record_telemetry(CAMERA, Telemetry(boot="b0", sequence=1, time=1.0, values={}), received=BEGIN - DAY_S)
        sent = fill(store, seconds=10 * 86400, every_s=1800)
        event = Event(kind="drift", boot="b1", sequence=490, time=BEGIN, data={})
        assert store.record_event(CAMERA, event, received=BEGIN)
        row, gaps = store.device(CAMERA), store.gaps(CAMERA)
        now = BEGIN + 10 * 86400
        forgotten = store.forget(Retention(telemetry_days=1, minutes_days=4, hours_days=30), now=now)
        assert forgotten == Forgotten(telemetry=1 + 9 * 48 - 1, minutes=1 + 6 * 48 - 1)
        assert store.forget(Retention(telemetry_days=1, minutes_days=4, hours_days=30), now=now) == Forgotten()
        assert (store.device(CAMERA), store.gaps(CAMERA)) == (row, gaps)
    with opened(store_name) as store:
        assert not store.record_telemetry(CAMERA, sent[0], received=now)  # a copy of what is forgotten
        missing = store.device(CAMERA).missing
        assert missing == 9
        assert store.record_telemetry(
            CAMERA, Telemetry(boot="b1", sequence=485, time=BEGIN + 5, values={}), received=now
        )
        row = store.device(CAMERA)
        assert (row.duplicates, row.missing, row.received) == (1, missing - 1, 1 + len(sent) + 2)
        total = sum(message.values["class/0"] for message in sent)
        assert store.class_mix(CAMERA, since=BEGIN - 1e6, until=now)["0"] == total
        short = store.telemetry(CAMERA, ("frames",), since=BEGIN + 7 * 86400, until=BEGIN + 7.1 * 86400)
        assert short.resolution_s == MINUTE  # as it came it is gone
        older = store.telemetry(CAMERA, ("frames",), since=BEGIN + 2 * 86400, until=BEGIN + 2.1 * 86400)
        assert older.resolution_s == HOUR
        assert (
            store.forget(Retention(telemetry_days=1, minutes_days=2, hours_days=3), now=now + 100 * DAY_S).events == 1
        )
        assert store.telemetry(CAMERA, ("frames",), since=BEGIN, until=now).times == []
        assert not store.record_event(CAMERA, event, received=now)


def test_a_large_round_of_forgetting_goes_in_parts(store, monkeypatch):
    monkeypatch.setattr("host.monitor.retention._ROWS_AT_ONCE", 7)
    sent = fill(store, seconds=86400, every_s=1800)
    pauses = iter([False, True])
    assert store.forget(Retention(), now=BEGIN + 9 * DAY_S, pause=lambda: next(pauses, True)).telemetry == 14
    assert store.forget(Retention(), now=BEGIN + 9 * DAY_S).telemetry == len(sent) - 14
    assert store.telemetry(CAMERA, ("frames",), since=BEGIN, until=BEGIN + 7200).resolution_s == MINUTE


@pytest.mark.parametrize(
    ("days", "message"),
    [
        ({"telemetry_days": 0}, "keep-telemetry: must be more than 0 days, got 0"),
        ({"hours_days": math.nan}, "keep-hours: must be more than 0"),
        ({"telemetry_days": 40}, "keep-telemetry: 40 days is longer than the 31 of keep-minutes"),
        ({"minutes_days": 800}, "keep-minutes: 800 days is longer than the 730 of keep-hours"),
    ],
)
def test_ages_that_make_no_sense_are_refused(days, message):
    with pytest.raises(MonitorError, match=message):
        Retention(**days)


def test_forgetting_goes_on_after_an_error_and_ends_with_its_block(caplog):
    rounds, pauses, enough = [], [], threading.Event()

    def forget_now(pause) -> Forgotten:
        pauses.append(pause())
        rounds.append(threading.current_thread().name)
        if len(rounds) == 1:
            raise MonitorError("the disk is full")
        if len(rounds) == 3:
            enough.set()
        return Forgotten(telemetry=1)

    with forgetting(forget_now, every_s=0.01):
        assert enough.wait(5)
    assert set(rounds) == {"retention"}
    assert pauses[0] is False
    assert "retention" not in [thread.name for thread in threading.enumerate()]
    assert "nothing forgotten" in caplog.text
