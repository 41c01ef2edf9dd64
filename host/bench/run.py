"""The verb: find what is to be measured, measure it in turn, here or on a board, and gather the figures."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path

from host.bench.contestants import Contestant, find_contestants
from host.bench.measure import WARM_UP, Extent, Measured, Test, Times, look, measure
from host.bench.on_board import bench_on_board
from host.bench.process import Worker
from host.bench.result import BenchResult, BenchRow
from host.bench.statistics import percentiles_ms, ratio_of_medians, waiting
from host.data.inputs import input_batches
from host.fleet.ssh import Remote
from host.machine import describe_machine

Report = Callable[[str, int, int, str], None]
_BATCH_SIZE = 64


def bench_files(
    paths: Sequence[Path],
    extent: Extent,
    *,
    num_threads: int,
    command: str,
    today: date,
    report: Report,
    board: Remote | None = None,
) -> BenchResult:
    """Measure every artifact of the bundles and every other file, interleaved; ratios are to the first.

    Args:
        paths: bundles, or model files.
        extent: how long.
        num_threads: of each runtime.
        command: what the user typed, for the record.
        today: for the record.
        report: hears how far it is.
        board: where to measure; None: here.

    Raises:
        BenchError: a file cannot be loaded or run; it names the file.
        ArtifactError: a bundle is damaged.
        DataError: a bundle's test images are not to be had.
        FleetError: the board cannot be reached, or has no runtime.
    """
    with tempfile.TemporaryDirectory(prefix="fieldvit-bench-") as temporary:
        contestants = [
            contestant
            for index, path in enumerate(paths)
            for contestant in find_contestants(path, Path(temporary) / str(index), num_threads=num_threads)
        ]
        if board:
            measured, seconds, machine = bench_on_board(contestants, extent, board, directory=Path(temporary))
        else:
            measured, seconds = _bench_here(contestants, extent, report)
            machine = describe_machine()
        rows = [
            _row(contestant, own, base=measured[0].times, is_here=board is None)
            for contestant, own in zip(contestants, measured, strict=True)
        ]
    return BenchResult(
        rows=tuple(rows),
        queries=len(measured[0].times.wall),
        warm_up=WARM_UP,
        seconds=seconds,
        num_threads=num_threads,
        is_on_board=board is not None,
        machine=machine,
        date=today.isoformat(),
        command=command,
    )


def _bench_here(contestants: Sequence[Contestant], extent: Extent, report: Report) -> tuple[list[Measured], float]:
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(contestant.subject)) for contestant in contestants]
        times, seconds = measure(
            workers,
            extent,
            report=lambda share, queries: report("bench", round(100 * share), 100, f"{queries} queries of each"),
        )
        measured = [
            look(worker, own, _test_of(contestant))
            for contestant, worker, own in zip(contestants, workers, times, strict=True)
        ]
    return measured, seconds


def _test_of(contestant: Contestant) -> Test | None:
    if contestant.test is None:
        return None
    images, spec = contestant.test
    return input_batches(images.images, spec, batch_size=_BATCH_SIZE), images.labels


def _row(contestant: Contestant, measured: Measured, *, base: Times, is_here: bool) -> BenchRow:
    subject, times = contestant.subject, measured.times
    p50, p90, p99 = percentiles_ms(times.wall)
    partitions, outside = _delegation(subject.path) if is_here and subject.runtime != "onnx" else (None, None)
    return BenchRow(
        file=contestant.file,
        artifact=contestant.artifact,
        runtime=measured.runtime,
        accuracy=measured.accuracy,
        accuracy_images=measured.accuracy_images,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        processor_p50_ms=percentiles_ms(times.processor)[0],
        waiting=waiting(times),
        ratio=ratio_of_medians(times.wall, base.wall),
        artifact_bytes=subject.path.stat().st_size,
        peak_memory_bytes=measured.peak_bytes,
        partitions=partitions,
        outside=outside,
    )


def _delegation(path: Path) -> tuple[int, dict[str, int]]:
    """XNNPACK's partitions of a file that a worker has run, and what it leaves outside."""
    from converters.gates import partitions
    from converters.quiet import quiet

    with quiet():
        count, outside = partitions(path)
    return count, dict(outside.most_common())
