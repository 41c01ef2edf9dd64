"""The verb: find what is to be measured, measure it in turn, and gather the figures."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path

from host.bench.contestants import Contestant, accuracy, find_contestants
from host.bench.measure import WARM_UP, Extent, Times, measure
from host.bench.process import Worker
from host.bench.result import BenchResult, BenchRow
from host.bench.statistics import percentiles_ms, ratio_of_medians, waiting
from host.machine import describe_machine

Report = Callable[[str, int, int, str], None]
_PACKAGES = {"artifact": ("LiteRT", "ai-edge-litert"), "tflite": ("LiteRT", "ai-edge-litert")}
_ONNX = ("onnxruntime", "onnxruntime")


def bench_files(
    paths: Sequence[Path], extent: Extent, *, num_threads: int, command: str, today: date, report: Report
) -> BenchResult:
    """Measure every artifact of the bundles and every other file, interleaved; ratios are to the first.

    Raises:
        BenchError: a file cannot be loaded or run; it names the file.
        ArtifactError: a bundle is damaged.
        DataError: a bundle's test images are not to be had.
    """
    with tempfile.TemporaryDirectory(prefix="fieldvit-bench-") as temporary, ExitStack() as stack:
        contestants = [
            contestant
            for index, path in enumerate(paths)
            for contestant in find_contestants(path, Path(temporary) / str(index), num_threads=num_threads)
        ]
        workers = [stack.enter_context(Worker(contestant.subject)) for contestant in contestants]
        times, seconds = measure(
            workers,
            extent,
            report=lambda share, queries: report("bench", round(100 * share), 100, f"{queries} queries of each"),
        )
        rows = [
            _row(contestant, worker, own, base=times[0])
            for contestant, worker, own in zip(contestants, workers, times, strict=True)
        ]
    return BenchResult(
        rows=tuple(rows),
        queries=len(times[0].wall),
        warm_up=WARM_UP,
        seconds=seconds,
        num_threads=num_threads,
        machine=describe_machine(),
        date=today.isoformat(),
        command=command,
    )


def _row(contestant: Contestant, worker: Worker, times: Times, *, base: Times) -> BenchRow:
    subject, test = contestant.subject, contestant.test
    peak = worker.peak_bytes()  # before the accuracy pass, which sends many images at once
    p50, p90, p99 = percentiles_ms(times.wall)
    name, package = _PACKAGES.get(subject.runtime, _ONNX)
    partitions, outside = _delegation(subject.path) if subject.runtime in _PACKAGES else (None, None)
    return BenchRow(
        file=contestant.file,
        artifact=contestant.artifact,
        runtime=f"{name} {version(package)}",
        accuracy=None if test is None else accuracy(worker, test),
        accuracy_images=0 if test is None else len(test[0]),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        processor_p50_ms=percentiles_ms(times.processor)[0],
        waiting=waiting(times),
        ratio=ratio_of_medians(times.wall, base.wall),
        artifact_bytes=subject.path.stat().st_size,
        peak_memory_bytes=peak,
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
