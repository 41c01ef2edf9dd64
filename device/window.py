"""When the agent may look for updates by itself: `update.window = "02:00-05:00"`, on `update.days`, in local time."""

import re
import time
from collections.abc import Callable

from device.contract.errors import ConfigError
from device.contract.record import record

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
BLIND_EVERY_S = 86400.0
"""A board that knows its clock to be wrong cannot tell the hour: it looks once in so long, whenever that is."""
_FORM = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_DAY_MINUTES = 24 * 60


@record(frozen=True, slots=True, kw_only=True)
class Window:
    """From `start` up to `end`, minutes of the day; past midnight where `end` is not later. `days` it opens on, 0 = Monday."""

    start: int
    end: int
    days: frozenset[int]

    @property
    def length_s(self) -> float:
        return 60.0 * ((self.end - self.start) % _DAY_MINUTES or _DAY_MINUTES)

    def is_open(self, moment: time.struct_time) -> bool:
        """Whether local time `moment` lies in it; after midnight the day counts on which it opened."""
        since = (moment.tm_hour * 60 + moment.tm_min - self.start) % _DAY_MINUTES
        opened_yesterday = moment.tm_hour * 60 + moment.tm_min < self.start
        return since * 60.0 < self.length_s and (moment.tm_wday - opened_yesterday) % 7 in self.days


def parse_window(text: str, days: tuple[str, ...]) -> Window | None:
    """The window of a configuration; None: always.

    Raises:
        ConfigError: not HH:MM-HH:MM, or a day that does not exist.
    """
    unknown = [day for day in days if day not in DAYS]
    if unknown:
        raise ConfigError(f"update.days: {unknown[0]!r} is no day; use {', '.join(DAYS)}")
    numbers = frozenset(DAYS.index(day) for day in days) or frozenset(range(7))
    if not text:
        return Window(start=0, end=0, days=numbers) if days else None
    found = _FORM.fullmatch(text)
    if not found:
        raise ConfigError(f'update.window must be like "02:00-05:00", got {text!r}')
    hour, minute, end_hour, end_minute = map(int, found.groups())
    return Window(start=60 * hour + minute, end=60 * end_hour + end_minute, days=numbers)


class Schedule:
    """Whether the hour allows an update that nobody asked for."""

    def __init__(
        self,
        window: Window | None,
        *,
        is_clock_wrong: Callable[[], bool],
        local_time: Callable[[], time.struct_time] = time.localtime,
        uptime: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window, self._is_clock_wrong, self._local_time, self._uptime = window, is_clock_wrong, local_time, uptime
        self._next_blind = uptime() + BLIND_EVERY_S
        self._is_blind = False

    def may_start(self) -> bool:
        """Whether to look now."""
        self._is_blind = self._window is not None and self._is_clock_wrong()
        if not self._is_blind:
            return self.is_open()
        if self._uptime() < self._next_blind:
            return False
        self._next_blind = self._uptime() + BLIND_EVERY_S
        return True

    def is_open(self) -> bool:
        """Whether what was started may go on."""
        return self._window is None or self._is_blind or self._window.is_open(self._local_time())
