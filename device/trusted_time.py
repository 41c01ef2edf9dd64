"""What time it is at least, on boards whose clock starts at 1970, at the last shutdown, or where somebody put it.

Signed metadata ends by the clock, so a clock that is wrong either refuses good updates or lets old ones in. A board knows
more than its clock: `fieldvit publish` signs into all metadata when it was `issued`. Time is the latest of

    the system's clock
    the anchor: the latest `issued` of metadata that this board has verified, plus the time that this process has run since
    what the clock once said, believed up to the moment when the newest verified timestamp ends

and is kept in ROOT/clock.json. What follows:

- A clock that is behind causes no false expiry: nothing that was issued since can have ended by the anchor alone.
- Setting the clock back gains nothing: what was seen to have ended stays ended, and what was issued stays issued.
- A frozen repository is noticed at the first check with a right clock, and by a board without any clock after it has run
  for as long as the timestamp was good for. Until then such a board accepts what was signed, and newest, at the anchor: it
  cannot know better. It never goes back behind a version it has seen, whatever the time.
- A clock that is ahead refuses updates while it is. Once it is right again, what it had said counts only until the repository
  is renewed (`fieldvit publish sign`): no jump into the future stops a board for good.
- A host that signs with its clock ahead carries every board that reads it along; `fieldvit publish` then goes on from there
  and never signs an earlier `issued`, so that its metadata stay good.

Not counted is what passes between the last check and a restart of the agent.
"""

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from device.contract.files import write_atomic

WRONG_BY_S = 60.0
"""A clock that is further behind than this is said to be wrong."""

log = logging.getLogger(__name__)


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class TrustedTime:
    """The board's notion of time. One for as long as the process lives."""

    def __init__(
        self, path: Path, *, clock: Callable[[], float] = time.time, uptime: Callable[[], float] = _uptime
    ) -> None:
        self._path, self._clock, self._uptime = path, clock, uptime
        self._anchor, self._believed = _read(path)
        self._anchored_at = uptime()
        self._has_warned = False

    def now(self) -> datetime:
        """UTC, never earlier than what this board knows to be past."""
        return _moment(max(self._clock(), self._least()))

    @property
    def is_clock_wrong(self) -> bool:
        """Whether the system's clock says a time that is known to be past."""
        return self._clock() < (self._grown_anchor() or self._believed) - WRONG_BY_S

    def learn(self, issued: datetime) -> None:
        """Take note of when verified metadata was issued."""
        if issued.timestamp() > self._grown_anchor():
            self._anchor, self._anchored_at = issued.timestamp(), self._uptime()

    def believe(self, ends: datetime) -> None:
        """Take note of what the clock says now, up to when the newest verified timestamp ends."""
        self._believed = max(self._believed, min(self._clock(), ends.timestamp() + 1))

    def save(self) -> None:
        """Keep it for the next start; a disk that does not take it is logged."""
        if self.is_clock_wrong and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the clock says %s but it is at least %s; set it (NTP), until then that time is used for updates",
                _moment(self._clock()).isoformat(timespec="seconds"),
                self.now().isoformat(timespec="seconds"),
            )
        table = {"anchor": round(self._grown_anchor(), 3), "believed": round(self._believed, 3)}
        try:
            write_atomic(self._path, json.dumps(table).encode())
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self._path, error)

    def _least(self) -> float:
        return max(self._grown_anchor(), self._believed)

    def _grown_anchor(self) -> float:
        return self._anchor + (max(self._uptime() - self._anchored_at, 0.0) if self._anchor else 0.0)


def _moment(seconds: float) -> datetime:
    """A clock may say anything; metadata ends within four-digit years."""
    limit = timedelta(days=365 * 7000).total_seconds()
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=min(max(seconds, 0.0), limit))


def _read(path: Path) -> tuple[float, float]:
    """The kept anchor and belief; zeros where there are none that make sense."""
    try:
        table = json.loads(path.read_bytes())
        anchor, believed = float(table["anchor"]), float(table["believed"])
        if 0 <= anchor < float("inf") and 0 <= believed < float("inf"):
            return anchor, believed
    except FileNotFoundError:
        return 0.0, 0.0
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.warning("%s: unreadable; time starts from the board's root metadata", path)
    return 0.0, 0.0
