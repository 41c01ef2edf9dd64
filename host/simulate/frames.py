"""How many frames a simulated board has looked at, and what they are called."""

from collections.abc import Callable


class FrameCount:
    """Counts frames of a steady rate; nothing happens for each.

    Args:
        frames_per_s: the rate.
        prefix: of the frames' ids; another one for each boot.
        kept: how many of the last frames a lesson may name.
        clock: seconds that never jump.
    """

    def __init__(self, frames_per_s: float, *, prefix: str, kept: int, clock: Callable[[], float]) -> None:
        self._prefix, self._kept, self._clock = prefix, kept, clock
        self.frames_per_s = frames_per_s
        self._before, self._since = 0.0, clock()
        self._began = self._since

    @property
    def uptime_s(self) -> float:
        """How long it has counted."""
        return self._clock() - self._began

    @property
    def total(self) -> int:
        return int(self._before + self.frames_per_s * (self._clock() - self._since))

    def change_rate(self, frames_per_s: float) -> None:
        now = self._clock()
        self._before += self.frames_per_s * (now - self._since)
        self.frames_per_s, self._since = frames_per_s, now

    def newest_id(self) -> str:
        return f"{self._prefix}-{self.total}"

    def has(self, frame_id: str) -> bool:
        """Whether it is the id of one of the last frames."""
        prefix, _, number = frame_id.rpartition("-")
        if prefix != self._prefix or not (number.isascii() and number.isdigit() and len(number) < 16):
            return False
        return self.total - self._kept < int(number) <= self.total
