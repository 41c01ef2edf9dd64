"""What is kept of several telemetry windows in place of each: by minute, by hour, and by slot of a chart.

One rule for each kind of value, wherever windows are put together:

- counts (frames, errors, classes): the sum;
- p50 and confidence: the mean, each window weighted by its frames. Of p50 this is not the p50 of all frames, which windows
  do not tell; of confidence it is the confidence of all frames;
- p90 and p99: the maximum, an upper bound of what all frames have;
- all others, gauges: mean, minimum, maximum and the last by the device's clock. A chart shows the mean of throughput, the last
  version, and of the rest the worst, the maximum.

A monitor does this with every message, twice, so the numbers lie in lists by what is done with them, one after the other by
name, and in the store as doubles.

Put together in any order or grouping, windows give the same, up to the rounding of sums; only of windows with one time the
one that came later is the last.
"""

import functools
import math
import operator
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


_BOUNDS = frozenset(("latency/p90", "latency/p99"))


def shown_as(name: str) -> str:
    """How a chart shows several windows' values of `name`."""
    return SUM if name.startswith(CLASS_PREFIX) else _SHOWN.get(name, MAXIMUM)


@dataclass(frozen=True, slots=True)
class Layout:
    """Names in the order in which an aggregate holds their numbers, by kind."""

    sums: tuple[str, ...]
    weighted: tuple[str, ...]
    bounds: tuple[str, ...]
    gauges: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.sums, *self.weighted, *self.bounds, *self.gauges)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the five lists of an aggregate."""
        sums, weighted, bounds, gauges = map(len, (self.sums, self.weighted, self.bounds, self.gauges))
        return 2 + sums + 2 * weighted + 2 * gauges, bounds + gauges, gauges, gauges, gauges


@lru_cache(maxsize=4096)  # windows of a fleet have few sets of names
def _layout(names: tuple[str, ...]) -> Layout:
    """The one layout of a set of names."""
    return _sorted_layout(tuple(sorted(names)))


@lru_cache(maxsize=4096)
def _sorted_layout(names: tuple[str, ...]) -> Layout:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault("bound" if name in _BOUNDS else shown_as(name), []).append(name)
    sums, weighted, bounds = (tuple(kinds.pop(kind, ())) for kind in (SUM, FRAME_WEIGHTED_MEAN, "bound"))
    return Layout(sums, weighted, bounds, tuple(sorted(name for left in kinds.values() for name in left)))


@dataclass(slots=True)
class Aggregate:
    """Windows put together.

    `added` is how many windows, the sum of their times, the sums, the weighted sums, their weights, and of each gauge how
    often and what sum; `highest` the bounds and the gauges' maxima; `lowest`, `last` and `last_times` are the gauges'.
    """

    layout: Layout
    added: list[float]
    highest: list[float]
    lowest: list[float]
    last: list[float]
    last_times: list[float]

    @classmethod
    def of(cls, time: float, values: Mapping[str, float]) -> Self:
        """One window."""
        layout = _layout(tuple(values))
        weight = values.get("frames", 0.0)
        weight = weight if weight > 0 else 1.0
        gauges = [values[name] for name in layout.gauges]
        added = [1.0, time, *[values[name] for name in layout.sums], *[values[n] * weight for n in layout.weighted]]
        added += [weight] * len(layout.weighted) + [1.0] * len(gauges) + gauges
        highest = [values[name] for name in layout.bounds] + gauges
        return cls(layout, added, highest, gauges, gauges, [time] * len(gauges))

    @classmethod
    def nothing(cls, layout: Layout) -> Self:
        """No windows; put together with others it changes nothing."""
        added, highest, lowest, last, _ = layout.lengths
        infinite = math.inf
        return cls(layout, [0.0] * added, [-infinite] * highest, [infinite] * lowest, [0.0] * last, [-infinite] * last)

    @classmethod
    def load(cls, names: str, numbers: bytes) -> Self:
        """What `names` and `numbers` of a stored one say."""
        layout = _layout(tuple(names.split(",")) if names else ())
        values = struct.unpack(f"<{len(numbers) // 8}d", numbers)
        parts, start = [], 0
        for length in layout.lengths:
            parts.append(list(values[start : start + length]))
            start += length
        return cls(layout, *parts)

    @property
    def names(self) -> str:
        return ",".join(self.layout.names)

    @property
    def numbers(self) -> bytes:
        """All numbers as little-endian doubles."""
        values = [*self.added, *self.highest, *self.lowest, *self.last, *self.last_times]
        return struct.pack(f"<{len(values)}d", *values)

    @property
    def windows(self) -> int:
        return int(self.added[0])

    @property
    def time(self) -> float:
        """The mean time of the windows."""
        return self.added[1] / self.added[0]

    def joined(self, other: "Aggregate") -> "Aggregate":
        """With `other`, which arrived later."""
        if self.layout is not other.layout:
            layout = _layout(tuple({*self.layout.names, *other.layout.names}))
            return self._widened(layout).joined(other._widened(layout))
        newer = [mine <= its for mine, its in zip(self.last_times, other.last_times, strict=True)]
        return Aggregate(
            self.layout,
            list(map(operator.add, self.added, other.added)),
            list(map(max, self.highest, other.highest)),
            list(map(min, self.lowest, other.lowest)),
            [its if is_newer else mine for mine, its, is_newer in zip(self.last, other.last, newer, strict=True)],
            list(map(max, self.last_times, other.last_times)),
        )

    def shown(self) -> dict[str, float]:
        """One value of each name, as a chart shows it; of a single window its own values."""
        layout, added = self.layout, iter(self.added[2:])
        values = {name: next(added) for name in layout.sums}
        weighted = [next(added) for _ in layout.weighted]
        values |= {name: total / next(added) for name, total in zip(layout.weighted, weighted, strict=True)}
        counts, sums = [next(added) for _ in layout.gauges], list(added)
        values |= dict(zip((*layout.bounds, *layout.gauges), self.highest, strict=True))
        for i, name in enumerate(layout.gauges):
            if shown_as(name) == MEAN:
                values[name] = sums[i] / counts[i]
            elif shown_as(name) == LAST:
                values[name] = self.last[i]
        return values

    def classes(self) -> dict[str, float]:
        """Predictions per class index, as text."""
        counts = zip(self.layout.sums, self.added[2:], strict=False)  # what follows is of other kinds
        return {name.removeprefix(CLASS_PREFIX): count for name, count in counts if name.startswith(CLASS_PREFIX)}

    def _widened(self, layout: Layout) -> "Aggregate":
        """The same with room for all names of `layout`."""
        if layout is self.layout:
            return self
        wide = Aggregate.nothing(layout)
        for mine, its, places in zip(self._lists(), wide._lists(), _places(self.layout, layout), strict=True):
            for place, number in zip(places, mine, strict=True):
                its[place] = number
        return wide

    def _lists(self) -> tuple[list[float], ...]:
        return self.added, self.highest, self.lowest, self.last, self.last_times


@lru_cache(maxsize=4096)
def _places(narrow: Layout, wide: Layout) -> tuple[tuple[int, ...], ...]:
    """Where in the lists of `wide` the numbers of `narrow` belong."""
    keys = [_keys(layout) for layout in (narrow, wide)]
    return tuple(tuple(its.index(key) for key in mine) for mine, its in zip(*keys, strict=True))


def _keys(layout: Layout) -> list[list[tuple[str, str]]]:
    """What each number of the five lists is of."""
    added = [("", "windows"), ("", "time"), *((name, SUM) for name in layout.sums)]
    added += [(name, part) for part in ("sum", "weight") for name in layout.weighted]
    added += [(name, part) for part in ("count", "sum") for name in layout.gauges]
    gauges = [(name, "") for name in layout.gauges]
    return [added, [(name, "") for name in layout.bounds] + gauges, gauges, gauges, gauges]


def put_together(aggregates: Iterable[Aggregate]) -> Aggregate:
    """All of them, in the order in which they arrived."""
    return functools.reduce(Aggregate.joined, aggregates, Aggregate.nothing(_layout(())))
