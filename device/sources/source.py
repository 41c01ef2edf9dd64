"""What all frame sources have in common: how the agent asks for frames, and how those it does not get are counted."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from device.frames import Frame

BAD_FRAMES_S = 1.0
"""How long `poll` goes on over bad frames alone: decoding them takes time, and the frame loop has more to do."""
TOLD_PER_MINUTE = 10
"""Skipped frames that the log names one by one; a folder of files that cannot be read must not fill it."""

log = logging.getLogger(__name__)


class Tally:
    """Frames that were not classified: bad ones by reason (`BAD_FRAME_REASONS`), and those dropped for newer ones."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._minute, self._lines = clock(), 0
        self._lock = threading.Lock()  # a source's thread counts, and the frame loop
        self._bad: Counter[str] = Counter()
        self._dropped = 0
        self._told: dict[str, int] = {}

    def count_bad(self, reason: str) -> None:
        with self._lock:
            self._bad[reason] += 1

    def skip(self, problem: str, reason: str) -> None:
        """Count a bad frame and log why, but no more than `TOLD_PER_MINUTE` a minute."""
        with self._lock:
            self._bad[reason] += 1
            if self._clock() - self._minute >= 60:
                self._minute, self._lines = self._clock(), 0
            self._lines += 1
            lines = self._lines
        if lines <= TOLD_PER_MINUTE:
            log.warning("frame skipped: %s", problem)
        elif lines == TOLD_PER_MINUTE + 1:
            log.warning("more frames are skipped, named again in a minute; 'fieldvit-device status' counts them all")

    def count_dropped(self) -> None:
        with self._lock:
            self._dropped += 1

    @property
    def bad(self) -> dict[str, int]:
        with self._lock:
            return dict(self._bad)

    @property
    def dropped(self) -> int:
        return self._dropped

    def window(self) -> dict[str, int]:
        """What was counted since the last call, under the names of the telemetry contract; nothing that is 0."""
        with self._lock:
            counts = {f"errors/{reason}": count for reason, count in self._bad.items()}
            counts |= {"frames/dropped": self._dropped}
            new = {name: count - self._told.get(name, 0) for name, count in counts.items()}
            self._told = counts
        return {name: count for name, count in new.items() if count}


class Source(Protocol):
    """Where frames come from. Only the frame loop calls it; no method takes longer than it says."""

    tally: Tally

    @property
    def problem(self) -> str:
        """Why no frames come though they should; "" while all is well."""

    def start(self) -> None:
        """Begin; the agent is ready for frames."""

    def poll(self, channels: int) -> Iterator[Frame]:
        """The frames that are there now, for a model of that many channels; fewer after `BAD_FRAMES_S` without a good one."""

    def wait(self, timeout_s: float, stop: threading.Event) -> None:
        """Return when there may be frames again, when `stop` is set, or after that time."""

    def stop(self) -> None:
        """End, and give devices back."""
