"""Single-stream measurement: one query at a time, of every contestant in turn.

Each round asks every contestant once, and begins with the next one each time, so a machine that slows down slows all of
them alike and nobody always follows the same load.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from host.bench.process import Worker
from host.bench.runtimes import describe_runtime

WARM_UP = 10
FIRST_LOOK = 256
"""Queries of each contestant where neither a number nor a time was asked for."""
_REPORT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How long to measure: until both minima are reached; seconds are those of the whole measurement."""

    queries: int = FIRST_LOOK
    seconds: float = 0.0

    @classmethod
    def of(cls, queries: int | None, seconds: float | None) -> "Extent":
        """What the options say: one of them alone decides alone."""
        if queries is None:
            return cls() if seconds is None else cls(queries=1, seconds=seconds)
        return cls(queries=queries, seconds=seconds or 0.0)

    def share(self, queries: int, seconds: float) -> float:
        """How much of it is done, 0..1."""
        return min(queries / self.queries, seconds / self.seconds if self.seconds else 1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What every query of one contestant took, in seconds, in order: float64 [n]."""

    wall: np.ndarray
    processor: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one contestant showed, here or on a board.

    Attributes:
        peak_bytes: peak resident memory of its process.
        accuracy: share of `accuracy_images` test images, 0..1; None where there were none.
        runtime: its runtime's name and version.
    """

    times: Times
    peak_bytes: int
    accuracy: float | None
    accuracy_images: int
    runtime: str


Test = tuple[Iterable[np.ndarray], np.ndarray]
"""Batches of images as the model takes them, float32 [n, H, W, C], and the labels of all, int64 [N]."""


def look(worker: Worker, times: Times, test: Test | None) -> Measured:
    """What a worker showed that has answered its queries; only now are the test images sent, and not timed."""
    peak_bytes, runtime = worker.peak_bytes(), describe_runtime(worker.subject.runtime)
    if test is None:
        return Measured(times=times, peak_bytes=peak_bytes, accuracy=None, accuracy_images=0, runtime=runtime)
    batches, labels = test
    is_right = np.concatenate([worker.answers(batch) for batch in batches]) == labels
    return Measured(
        times=times,
        peak_bytes=peak_bytes,
        accuracy=float(is_right.mean()),
        accuracy_images=len(labels),
        runtime=runtime,
    )


def measure(
    workers: Sequence[Worker], extent: Extent, *, report: Callable[[float, int], None]
) -> tuple[list[Times], float]:
    """Warm up, then query all workers in turn; returns their times and the seconds it all took.

    `report` is told now and then what share is done and how many queries of each that were.
    """
    for _ in range(WARM_UP):
        for worker in workers:
            worker.query()
    taken: list[list[tuple[float, float]]] = [[] for _ in workers]
    start, reported, rounds, elapsed = time.perf_counter(), 0.0, 0, 0.0
    while extent.share(rounds, elapsed) < 1:
        for place in range(len(workers)):
            index = (rounds + place) % len(workers)
            taken[index].append(workers[index].query())
        rounds, elapsed = rounds + 1, time.perf_counter() - start
        if elapsed - reported > _REPORT_S:
            reported = elapsed
            report(extent.share(rounds, elapsed), rounds)
    report(1.0, rounds)
    arrays = [np.array(pairs) for pairs in taken]
    return [Times(wall=array[:, 0], processor=array[:, 1]) for array in arrays], elapsed
