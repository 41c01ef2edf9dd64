"""What a measurement found: one row per contestant, and what a reader must know to trust it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from host.bench.statistics import Ratio

COLUMNS = (
    "file",
    "accuracy",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "processor p50",
    "ratio of p50",
    "kB",
    "peak MB",
    "partitions",
    "outside XNNPACK",
)
QUOTABLE_QUERIES, QUOTABLE_SECONDS = 1024, 60.0
BUSY = 1.2
"""Wall time in processor time from which on the machine is called busy."""
NONE = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One contestant's figures.

    Attributes:
        accuracy: share of `accuracy_images` test images, 0..1; None for a file whose classes are not known.
        processor_p50_ms: median of the processor time of a query; with several threads of all of them together.
        waiting: wall time of all queries in their processor time.
        ratio: this p50 in that of the first row.
        partitions: how many parts of the graph XNNPACK takes; None outside LiteRT.
        outside: operations of that graph that it does not take, by name; None outside LiteRT.
    """

    file: str
    artifact: str
    runtime: str
    accuracy: float | None
    accuracy_images: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    processor_p50_ms: float
    waiting: float
    ratio: Ratio
    artifact_bytes: int
    peak_memory_bytes: int
    partitions: int | None
    outside: Mapping[str, int] | None

    @property
    def title(self) -> str:
        return f"{self.file} {self.artifact}".rstrip()

    def cells(self, columns: Sequence[str]) -> tuple[str, ...]:
        """As text, in the order of the columns: those of `COLUMNS`, "test images" and "runtime"."""
        texts = {
            "file": self.title,
            "accuracy": NONE if self.accuracy is None else f"{self.accuracy:.2%}",
            "test images": str(self.accuracy_images or NONE),
            "p50 ms": f"{self.p50_ms:.3f}",
            "p90 ms": f"{self.p90_ms:.3f}",
            "p99 ms": f"{self.p99_ms:.3f}",
            "processor p50": f"{self.processor_p50_ms:.3f}",
            "ratio of p50": "{:.3f} ({:.3f}–{:.3f})".format(*self.ratio),
            "kB": f"{self.artifact_bytes / 1e3:.0f}",
            "peak MB": f"{self.peak_memory_bytes / 1e6:.0f}",
            "runtime": self.runtime,
            "partitions": NONE if self.partitions is None else str(self.partitions),
            "outside XNNPACK": _operations(self.outside),
        }
        return tuple(texts[column] for column in columns)


def _operations(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return NONE
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """A measurement, here or on a board; the first row is what ratios are to."""

    rows: tuple[BenchRow, ...]
    queries: int
    warm_up: int
    seconds: float
    num_threads: int
    is_on_board: bool
    machine: Mapping[str, Any]
    date: str
    command: str

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [
            {**asdict(row), "ratio": row.ratio.value, "ratio_low": row.ratio.low, "ratio_high": row.ratio.high}
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows, "notes": list(self.notes())}

    def notes(self) -> Iterator[str]:
        """What to know about the figures, a line each."""
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        yield (
            f"{self.queries} queries of each file in {self.seconds:.1f} s, one at a time and in turn, on {threads}, "
            f"after {self.warm_up} to warm up"
        )
        if self.is_on_board:
            yield "measured on the board, in its own runtime; what XNNPACK takes there was not looked at"
        if self.queries < QUOTABLE_QUERIES and self.seconds < QUOTABLE_SECONDS:
            yield (
                f"a first look: for figures to quote measure --queries {QUOTABLE_QUERIES} or "
                f"--seconds {QUOTABLE_SECONDS:.0f}"
            )
        for row in self.rows:
            if row.waiting > BUSY:
                yield (
                    f"the machine was busy: queries of {row.title} took {row.waiting:.2f} times their processor time, "
                    "so other programs are in these times, and ratios may be off by more than their interval; "
                    "compare processor p50, or measure on an idle machine"
                )
                break
        if any(row.accuracy is not None for row in self.rows):
            yield (
                "a bundle's artifacts answer real test images, backbone and head, as on a board; other files get "
                "random input, and their accuracy is not known"
            )
        if len(self.rows) > 1:
            yield "ratio: to the first row, with its 95 % interval (paired block bootstrap)"
