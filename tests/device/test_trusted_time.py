"""No clock, however wrong, lets old metadata in or keeps good metadata out for good."""

import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.contract.errors import ConfigError
from device.trusted_time import TrustedTime
from device.window import BLIND_EVERY_S, Schedule, Window, parse_window

ISSUED = datetime(2026, 6, 1, tzinfo=UTC)
ENDS = ISSUED + timedelta(days=30)
DAY = 86400.0


class Board:
    """A board whose clock and uptime a test sets."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "clock.json"
        self.clock, self.uptime = 0.0, 100.0
        self.start()

    def start(self) -> None:
        """The agent starts (again)."""
        self.time = TrustedTime(self.path, clock=lambda: self.clock, uptime=lambda: self.uptime)

    def check(self, issued: datetime = ISSUED, ends: datetime = ENDS) -> bool:
        """Verify metadata as `device.tuf_client` does; whether they are accepted."""
        was_good = self.time.now() < ends
        self.time.learn(issued)
        self.time.believe(ends)
        self.time.save()
        return was_good and self.time.now() < ends


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_a_clock_at_1970_refuses_nothing_good(board: Board):
    assert board.check()
    assert board.time.is_clock_wrong
    board.start()
    assert board.time.now() == ISSUED
    assert board.check()


def test_a_frozen_repository_is_noticed_once_the_clock_is_right_and_stays_so(board: Board):
    assert board.check()
    board.clock = (ENDS + timedelta(days=1)).timestamp()
    assert not board.check()
    for clock in (0.0, ISSUED.timestamp(), (ENDS - timedelta(days=9)).timestamp()):
        board.clock = clock
        assert not board.check()
        board.start()
        assert not board.check()


def test_a_board_without_a_clock_notices_by_having_run_so_long(board: Board):
    assert board.check()
    for _ in range(2):
        board.uptime += 14 * DAY
        assert board.check()
        board.start()
    board.uptime += 3 * DAY
    assert not board.check()


def test_a_jump_into_the_future_is_over_with_the_next_renewal(board: Board):
    board.clock = ISSUED.timestamp()
    assert board.check()
    board.clock = datetime(2099, 1, 1, tzinfo=UTC).timestamp()
    assert not board.check()
    board.clock = (ISSUED + timedelta(days=1)).timestamp()
    assert not board.check()  # cannot be told from a frozen repository
    assert board.check(ISSUED + timedelta(days=1), ENDS + timedelta(days=1))
    for day in range(2, 90):
        board.clock += DAY
        board.uptime += DAY
        assert board.check(ISSUED + timedelta(days=day), ENDS + timedelta(days=day))
    assert not board.time.is_clock_wrong


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"anchor": "x", "believed": 1}', b'{"anchor": Infinity, "believed": 1}']
)
def test_a_damaged_file_is_as_good_as_none(board: Board, content: bytes):
    board.path.write_bytes(content)
    board.start()
    assert board.time.now() == datetime(1970, 1, 1, tzinfo=UTC)
    assert board.check()


def test_a_disk_that_is_full_stops_nothing(tmp_path: Path):
    board = Board(tmp_path / "no" / "directory")
    (tmp_path / "no").write_text("a file")
    assert board.check()


def test_any_clock_is_a_time(board: Board):
    for board.clock in (-1e18, 0.0, 1e18):
        assert 1970 <= board.time.now().year < 9999


CLOCKS = st.sampled_from([0.0, 1e9, ISSUED.timestamp(), ENDS.timestamp(), 4e9, 1e12]) | st.just("right")
STEPS = st.lists(
    st.tuples(
        CLOCKS,
        st.floats(0, 40 * DAY),  # how much later
        st.booleans(),  # whether the board ran meanwhile
        st.booleans(),  # whether it sees what was issued just now, or what was issued first
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_after_any_clocks_what_is_new_is_good_and_what_was_seen_to_be_over_stays_over(steps: list[Any]):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        board, now, is_over = Board(Path(directory)), ISSUED.timestamp(), False
        for clock, later, is_running, is_fresh in steps:
            now += later + 2
            board.uptime += later if is_running else 0
            if not is_running:
                board.start()
            board.clock = now if clock == "right" else clock
            issued = datetime.fromtimestamp(now, UTC) if is_fresh else ISSUED
            accepted = board.check(issued, issued + timedelta(days=30))
            assert not (accepted and not is_fresh and is_over)
            is_over |= clock == "right" and now > ENDS.timestamp() + 1
        board.clock = now = now + 2
        issued = datetime.fromtimestamp(now, UTC)
        assert board.check(issued, issued + timedelta(days=30))


def local(weekday: int, hour: int, minute: int = 0) -> time.struct_time:
    return time.struct_time((2026, 6, 1 + weekday, hour, minute, 0, weekday, 152 + weekday, 0))


@pytest.mark.parametrize(
    ("text", "days", "is_open", "is_closed"),
    [
        ("02:00-05:00", (), [(0, 2), (6, 4, 59)], [(0, 1, 59), (0, 5), (3, 14)]),
        ("22:00-04:30", (), [(0, 22), (0, 3), (0, 4, 29)], [(0, 4, 30), (0, 21, 59)]),
        ("22:00-04:00", ("fri",), [(4, 23), (5, 3)], [(5, 23), (4, 3), (6, 3)]),
        ("00:00-00:00", ("sun",), [(6, 0), (6, 23, 59)], [(5, 23, 59), (0, 0)]),
        ("", ("sat", "sun"), [(5, 0), (6, 23)], [(4, 23), (0, 0)]),
    ],
)
def test_a_window_opens_and_closes(
    text: str, days: tuple[str, ...], is_open: list[tuple[int, ...]], is_closed: list[tuple[int, ...]]
):
    window = parse_window(text, days)
    assert [moment for moment in is_open if not window.is_open(local(*moment))] == []
    assert [moment for moment in is_closed if window.is_open(local(*moment))] == []


def test_no_window_is_always_open_and_wrong_ones_are_refused():
    assert parse_window("", ()) is None
    for text, days in (("2-5", ()), ("02:00-25:00", ()), ("02:00", ()), ("02:00-05:00", ("monday",))):
        with pytest.raises(ConfigError, match=r"must be like|is no day"):
            parse_window(text, days)


def test_a_board_that_cannot_tell_the_hour_looks_once_a_day():
    now, wrong = [0.0], [True]
    window = Window(start=120, end=300, days=frozenset(range(7)))
    schedule = Schedule(window, is_clock_wrong=lambda: wrong[0], local_time=lambda: local(0, 12), uptime=lambda: now[0])
    assert not schedule.may_start()
    now[0] = BLIND_EVERY_S
    assert [schedule.may_start(), schedule.is_open(), schedule.may_start()] == [True, True, False]
    wrong[0] = False
    now[0] *= 3
    assert not schedule.may_start()
    assert not schedule.is_open()
