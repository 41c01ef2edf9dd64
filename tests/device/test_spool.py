"""The spool's laws: nothing is lost without being counted, bounds hold, commands are answered once."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.spool import COMMANDS_KEPT, HIGH, LOW, RETRY_S, Spool

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
    return Spool(
        directory / "spool.db",
        max_bytes=max_bytes,
        max_age_s=max_age_s,
        clock=clock or Clock(),
        wall_clock=clock or Clock(),
    )


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
    for _ in range(300):
        spool.put_numbered("telemetry", lambda sequence: bytes(10_000), priority=LOW)
    assert spool.depth + spool.dropped == 300
    assert 0 < spool.dropped < 150  # memory took what it may
    assert spool.pending(0, 1)
    assert spool.receive_command("c", expires=2000)
    assert spool.answer_command("c", b"done")


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
    assert spool.depth == 0
    assert spool.dropped in (1, 50)  # as far as the old figures could still be read
    spool.put("event", b"x")
    assert (tmp_path / "spool.db.damaged").exists()
    assert sorted(path.name for path in tmp_path.glob("*.damaged*")) == ["spool.db.damaged"]


def test_a_file_that_is_damaged_while_it_is_used_is_set_aside_and_counted(tmp_path: Path):
    spool = open_spool(tmp_path, max_bytes=10**7)
    for _ in range(1000):
        spool.put("event", bytes(2000))
    spool.put_journaled(7, None)
    spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spool._db.execute("PRAGMA shrink_memory")
    with (tmp_path / "spool.db").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(range(256)) * 8000)
    spool.put_numbered("event", lambda sequence: b"after")
    assert [message.payload for message in spool.pending(0, 10)] == [b"after"]
    assert (spool.depth, spool.dropped, spool.journal_mark) == (1, 1000, 7)
    spool.close()
    spool = open_spool(tmp_path)
    assert (spool.depth, spool.dropped, spool.journal_mark) == (1, 1000, 7)


@pytest.mark.parametrize("what", ["pending", "acknowledge", "receive", "answer"])
def test_no_operation_raises_on_a_damaged_file(tmp_path: Path, what: str):
    spool = open_spool(tmp_path, max_bytes=10**7)
    for _ in range(300):
        spool.put("event", bytes(3000))
    spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spool._db.execute("PRAGMA shrink_memory")
    with (tmp_path / "spool.db").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(range(256)) * 3000)
    call = {
        "pending": lambda: spool.pending(0, 500),
        "acknowledge": lambda: spool.acknowledge(200),
        "receive": lambda: spool.receive_command("c", 1.0),
        "answer": lambda: spool.answer_command("c", b"r"),
    }
    call[what]()
    spool.put("event", b"x")
    assert spool.dropped >= 300


def test_without_a_place_messages_wait_in_memory_and_move_when_there_is_one(tmp_path: Path):
    clock = Clock()
    spool = open_spool(tmp_path / "missing", clock)
    spool.put("event", b"1")
    assert spool.receive_command("c", expires=2000)
    assert [message.payload for message in spool.pending(0, 10)] == [b"1"]
    (tmp_path / "missing").mkdir()
    clock.now += RETRY_S
    spool.put("event", b"2")
    spool.close()
    again = open_spool(tmp_path / "missing", clock)
    assert [message.payload for message in again.pending(0, 10)] == [b"1", b"2"]
    assert again.unanswered_commands() == ["c"]


def test_after_disk_trouble_everything_is_sent_again_and_nothing_twice_remembered(tmp_path: Path):
    clock = Clock()
    spool = open_spool(tmp_path, clock, max_bytes=10**6, max_age_s=10**6)
    for number in range(5):
        spool.put("event", b"%d" % number)
    spool.receive_command("c", expires=2000)
    sent = spool.pending(0, 10)[-1].id
    spool._db.execute("PRAGMA query_only = 1")  # as a disk that became read-only
    spool.put("event", b"5")
    assert not spool.receive_command("c", expires=2000)
    assert spool.answer_command("c", b"6")
    assert (spool.depth, spool.dropped) == (7, 0)
    while_away = spool.pending(sent, 10)
    assert [message.payload for message in while_away] == [b"5", b"6"]
    for _ in range(20):  # ids do not run away when the disk comes and goes
        clock.now += RETRY_S
        last = spool.pending(0, 10)[-1].id
        spool._db.execute("PRAGMA query_only = 1")
        spool.put("event", b"x")
        spool.acknowledge(spool.pending(0, 10)[0].id)
    clock.now += RETRY_S
    messages = spool.pending(while_away[-1].id, 100)
    assert [message.payload for message in messages] == [b"%d" % number for number in range(7)]
    assert messages[0].id > last
    assert messages[-1].id < 1000
    assert spool.unanswered_commands() == []
    assert spool.dropped == 0


def test_a_clock_that_is_set_drops_nothing_and_age_counts_only_uptime(tmp_path: Path):
    clock = Clock()
    clock.now = 5.0  # a monotonic clock starts again at each boot
    spool = open_spool(tmp_path, clock)
    spool.put("event", b"old")
    clock.now += 60
    spool.put("event", b"newer")
    spool.close()
    clock.now = 1e9  # another boot: the time between is not known
    spool = open_spool(tmp_path, clock)
    spool.put("event", b"x")
    assert (spool.depth, spool.dropped) == (3, 0)
    clock.now += 50
    spool.put("event", b"y")
    assert [message.payload for message in spool.pending(0, 10)] == [b"newer", b"x", b"y"]
    spool.close()
    assert open_spool(tmp_path, clock).dropped == 1


def test_commands_that_expire_in_the_far_future_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.spool.MAX_COMMANDS", 100)
    spool = open_spool(tmp_path)
    for number in range(150):
        assert spool.receive_command(str(number), expires=1e18)
        spool.answer_command(str(number), b"done")
    assert spool._db.execute("SELECT count(*) FROM command").fetchone() == (100,)
    assert not spool.receive_command("149", expires=1e18)


def test_messages_survive_a_process_that_dies(tmp_path: Path):
    spool = open_spool(tmp_path)
    spool.put("event", b"x")
    with sqlite3.connect(tmp_path / "spool.db") as other:  # what the next process would read
        assert other.execute("SELECT count(*) FROM message").fetchone() == (1,)
    other.close()


def test_what_was_acknowledged_lately_is_sent_again_first_and_in_order(tmp_path: Path):
    now = [0.0]
    spool = Spool(tmp_path / "spool.db", max_bytes=10**6, max_age_s=10**6, clock=lambda: now[0])
    for number in range(6):
        now[0] += 10
        spool.put("event", b"%d" % number)
        if number < 5:
            spool.acknowledge(number + 1)
    spool.receive_command("c", 0)
    spool.answer_command("c", b"reply")
    (reply,) = spool.pending(0, 9, are_replies=True)
    spool.acknowledge(reply.id)
    assert spool.depth == 1
    spool.close()
    spool = Spool(tmp_path / "spool.db", max_bytes=10**6, max_age_s=10**6, clock=lambda: now[0])
    assert spool.resend() == 3  # of the last 30 seconds
    assert [message.payload for message in spool.pending(0, 9)] == [b"2", b"3", b"4", b"5"]
    assert (spool.depth, spool.dropped) == (4, 0)
    for message in spool.pending(0, 9):
        spool.acknowledge(message.id)
    now[0] += 1000
    assert (spool.resend(), spool.depth, spool.payload_bytes) == (0, 0, 0)


def test_what_is_kept_after_its_acknowledgement_is_bounded_and_never_counted_as_dropped(tmp_path: Path):
    spool = Spool(tmp_path / "spool.db", max_bytes=8000, max_age_s=10**6)
    for number in range(100):
        spool.put("event", b"%050d" % number)
        (message,) = spool.pending(0, 9)
        spool.acknowledge(message.id)
    assert spool.resend() == 8000 // 8 // 50
    assert [int(message.payload) for message in spool.pending(0, 99)] == list(range(80, 100))
    assert spool.dropped == 0
