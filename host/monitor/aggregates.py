"""What is kept of several telemetry windows in place of each: by minute, by hour, and by slot of a chart.

One rule for each kind of value, wherever windows are put together:

- counts (frames, errors, classes): the sum;
- p50 and confidence: the mean, each window weighted by its frames. Of p50 this is not the p50 of all frames, which windows
  do not tell; of confidence it is the confidence of all frames;
- p90 and p99: the maximum, an upper bound of what all frames have;
- all others, gauges: mean, minimum, maximum and the last by the device's clock. A chart shows the mean of throughput, the last
  version, and of the rest the worst, the maximum.

Put together in any order or grouping, windows give the same, up to the rounding of sums; only of windows with one time the
one that came later is the last.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

from device.contract.messages import CLASS_PREFIX, UNITS

SUM = "sum"
FRAME_WEIGHTED_MEAN = "frame-weighted mean"
MAXIMUM = "maximum"
MEAN = "mean"
LAST = "last"

_SUMS = frozenset(name for name in UNITS if name.partition("/")[0] in ("frames", "errors"))
_SHOWN = {
    **dict.fromkeys(_SUMS, SUM),
    "latency/p50": FRAME_WEIGHTED_MEAN,
    "confidence": FRAME_WEIGHTED_MEAN,
    "throughput": MEAN,
    "learned/version": LAST,
}


@lru_cache(maxsize=4096)  # asked for every value of every message
def shown_as(name: str) -> str:
    """How a chart shows several windows' values of `name`."""
    return SUM if name.startswith(CLASS_PREFIX) else _SHOWN.get(name, MAXIMUM)


@dataclass(slots=True)
class Aggregate:
    """Windows put together; `parts` holds of each name what its kind needs to go on, in lists that are never changed.

    Sums and maxima are [value], weighted means [sum, weight], gauges [count, sum, minimum, maximum, last, time of last].
    """

    windows: int = 0
    time_sum: float = 0.0  # of the windows' times
    parts: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, time: float, values: Mapping[str, float]) -> Self:
        """One window."""
        weight = values.get("frames", 0.0)
        weight = weight if weight > 0 else 1.0
        return cls(1, time, {name: _begin(name, value, time, weight) for name, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(*json.loads(text))

    def to_json(self) -> str:
        return json.dumps([self.windows, self.time_sum, self.parts], separators=(",", ":"))

    @property
    def time(self) -> float:
        """The mean time of the windows."""
        return self.time_sum / self.windows

    def add(self, other: "Aggregate") -> None:
        """Take in `other`, which arrived later."""
        self.windows += other.windows
        self.time_sum += other.time_sum
        for name, part in other.parts.items():
            mine = self.parts.get(name)
            self.parts[name] = part if mine is None else _joined(name, mine, part)

    def shown(self) -> dict[str, float]:
        """One value of each name, as a chart shows it; of a single window its own values."""
        return {name: _value(name, part) for name, part in self.parts.items()}

    def classes(self) -> dict[str, float]:
        """Predictions per class index, as text."""
        return {
            name.removeprefix(CLASS_PREFIX): part[0]
            for name, part in self.parts.items()
            if name.startswith(CLASS_PREFIX)
        }


def put_together(aggregates: Iterable[Aggregate]) -> Aggregate:
    total = Aggregate()
    for aggregate in aggregates:
        total.add(aggregate)
    return total


_BOUNDS = frozenset(("latency/p90", "latency/p99"))


def _begin(name: str, value: float, time: float, weight: float) -> list[float]:
    kind = shown_as(name)
    if kind == SUM or name in _BOUNDS:
        return [value]
    if kind == FRAME_WEIGHTED_MEAN:
        return [value * weight, weight]
    return [1, value, value, value, value, time]


def _joined(name: str, mine: list[float], other: list[float]) -> list[float]:
    kind = shown_as(name)
    if kind == SUM:
        return [mine[0] + other[0]]
    if name in _BOUNDS:
        return [max(mine[0], other[0])]
    if kind == FRAME_WEIGHTED_MEAN:
        return [mine[0] + other[0], mine[1] + other[1]]
    last = other[4:] if other[5] >= mine[5] else mine[4:]
    return [mine[0] + other[0], mine[1] + other[1], min(mine[2], other[2]), max(mine[3], other[3]), *last]


def _value(name: str, part: list[float]) -> float:
    match shown_as(name):
        case "sum":
            return part[0]
        case "frame-weighted mean":
            return part[0] / part[1]
        case "mean":
            return part[1] / part[0]
        case "last":
            return part[4]
    return part[0] if name in _BOUNDS else part[3]
