"""The spool's laws: nothing is lost without being counted, bounds hold, commands are answered once."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.contract.errors import ConfigError
from device.spool import COMMANDS_KEPT, HIGH, LOW, Spool

MAX_BYTES = 1000

operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from([LOW, HIGH]), st.integers(1, 400)),
        st.tuples(st.just("acknowledge"), st.integers(0, 5), st.none()),
        st.tuples(st.just("restart"), st.none(), st.none()),
        st.tuples(st.just("wait"), st.floats(0, 40), st.none()),
    ),
    max_size=40,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device.spool.SYNCHRONOUS", "OFF")


def open_spool(
    directory: Path, clock: Clock | None = None, *, max_bytes: int = MAX_BYTES, max_age_s: float = 100
) -> Spool:
    return Spool(directory / "spool.db", max_bytes=max_bytes, max_age_s=max_age_s, clock=clock or Clock())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(operations)
def test_every_message_is_waiting_acknowledged_or_counted(tmp_path_factory, steps):
    directory, clock = tmp_path_factory.mktemp("spool"), Clock()
    spool = open_spool(directory, clock)
    put = acknowledged = 0
    for step, first, second in steps:
        if step == "put":
            spool.put("telemetry", bytes(second), priority=first)
            put += 1
        elif step == "acknowledge":
            for message in spool.pending(0, first):
                spool.acknowledge(message.id)
                acknowledged += 1
        elif step == "wait":
            clock.now += first
        else:
            spool.close()
            spool = open_spool(directory, clock)
        waiting = spool.pending(0, 1000)
        assert len(waiting) + acknowledged + spool.dropped == put
        assert spool.depth == len(waiting)
        assert spool.payload_bytes == sum(len(message.payload) for message in waiting) <= MAX_BYTES
        assert [message.id for message in waiting] == sorted(message.id for message in waiting)
    spool.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([LOW, HIGH]), min_size=1, max_size=40))
def test_telemetry_is_dropped_first_and_the_oldest_first(tmp_path_factory, priorities):
    spool = open_spool(tmp_path_factory.mktemp("spool"))
    for number, priority in enumerate(priorities):
        spool.put("high" if priority else "low", b"%0100d" % number, priority=priority)
    kept = [(message.kind, int(message.payload)) for message in spool.pending(0, 100)]
    everything = [("high" if priority else "low", number) for number, priority in enumerate(priorities)]
    high = [item for item in everything if item[0] == "high"][-10:]
    low = [item for item in everything if item[0] == "low"]
    assert [item for item in kept if item[0] == "high"] == high
    newest_low = [item for item in kept if item[0] == "low"]
    assert newest_low == low[len(low) - len(newest_low) :]
    assert len(kept) == min(10, len(everything))
    spool.close()


def test_sequence_numbers_have_no_gaps_and_start_at_one(tmp_path: Path):
    spool = open_spool(tmp_path)
    for number in range(1, 6):
        spool.put_numbered("event", lambda sequence: str(sequence).encode())
        spool.put_journaled(number, lambda sequence: str(sequence).encode())
    assert [int(message.payload) for message in spool.pending(0, 100)] == list(range(1, 11))
    assert spool.journal_mark == 5
    spool.close()
    assert open_spool(tmp_path).journal_mark == 5


def test_an_event_that_cannot_be_built_moves_nothing(tmp_path: Path):
    spool = open_spool(tmp_path)
    with pytest.raises(ZeroDivisionError):
        spool.put_journaled(1, lambda sequence: bytes(1 // 0))
    assert (spool.journal_mark, spool.depth) == (0, 0)


def test_a_command_is_new_once_and_answered_once_also_after_a_restart(tmp_path: Path):
    spool = open_spool(tmp_path)
    assert spool.receive_command("c", expires=2000)
    assert not spool.receive_command("c", expires=2000)
    spool.close()
    spool = open_spool(tmp_path)
    assert spool.unanswered_commands() == ["c"]
    assert not spool.receive_command("c", expires=2000)
    assert spool.answer_command("c", b"first")
    assert not spool.answer_command("c", b"second")
    assert [message.payload for message in spool.pending(0, 10)] == [b"first"]
    assert spool.unanswered_commands() == []


def test_only_expired_commands_are_forgotten(tmp_path: Path):
    clock = Clock()
    spool = open_spool(tmp_path, clock, max_bytes=10**6, max_age_s=10**9)
    for number in range(COMMANDS_KEPT + 50):
        clock.now += 1
        spool.receive_command(str(number), expires=clock.now + (5 if number % 2 else 10**6))
        spool.answer_command(str(number), b"done")
    assert not spool.receive_command("0", expires=10**9)
    assert spool.receive_command("1", expires=10**9)


def test_a_message_over_the_whole_bound_is_counted(tmp_path: Path):
    spool = open_spool(tmp_path)
    spool.put("event", bytes(MAX_BYTES + 1))
    assert (spool.depth, spool.dropped) == (0, 1)


def test_a_full_disk_loses_messages_countably_but_stops_nothing(tmp_path: Path):
    spool = open_spool(tmp_path, max_bytes=10**7)
    spool._db.execute("PRAGMA max_page_count = 20")
    for _ in range(30):
        spool.put_numbered("telemetry", lambda sequence: bytes(10_000), priority=LOW)
    assert spool.depth + spool.dropped == 30
    assert 0 < spool.dropped < 30


@pytest.mark.parametrize("damage", [b"no database at all" * 100, None])
def test_a_damaged_file_is_set_aside_and_counted(tmp_path: Path, damage: bytes | None):
    spool = open_spool(tmp_path, max_bytes=10**6)
    for _ in range(50):
        spool.put("event", bytes(1000))
    spool.close()
    path = tmp_path / "spool.db"
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = bytes(len(content) - 4096 * 2)
    path.write_bytes(damage or bytes(content))
    spool = open_spool(tmp_path)
    assert (spool.depth, spool.dropped) == (0, 1)
    spool.put("event", b"x")
    assert (tmp_path / "spool.db.damaged").exists()


def test_a_place_that_cannot_be_opened_is_a_configuration_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_spool(tmp_path / "missing")


def test_messages_survive_a_process_that_dies(tmp_path: Path):
    spool = open_spool(tmp_path)
    spool.put("event", b"x")
    with sqlite3.connect(tmp_path / "spool.db") as other:  # what the next process would read
        assert other.execute("SELECT count(*) FROM message").fetchone() == (1,)
    other.close()
