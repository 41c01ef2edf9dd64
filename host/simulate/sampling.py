"""How much a simulated board looks and tells; set by command, kept over reboots."""

from dataclasses import dataclass, fields, replace
from typing import Self

from device.contract.commands import SamplingChange


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is in force: frames per second (0: as the board can), seconds between telemetry, whether results are sent."""

    max_fps: float
    telemetry_interval_s: float
    results: bool

    def changed(self, change: SamplingChange, *, configured: Self) -> Self:
        """What is in force after a command; what it leaves out stays as it is, or with `reset` as configured."""
        given = {field.name: getattr(change, field.name) for field in fields(self)}
        before = configured if change.reset else self
        return replace(before, **{name: value for name, value in given.items() if value is not None})

    def frames_per_s(self, fastest: float) -> float:
        return min(fastest, self.max_fps) if self.max_fps else fastest
