"""What `fieldvit bench --on` has a board do: the same queries in turn, in the runtime that is installed there.

    python bench.pyz FOLDER      FOLDER/job.json names the files beside it; the answer is one line of JSON

This module, and all it imports from here, goes to the board as one archive: NumPy and `device` are there already.
Test images go there as they are, and are pre-processed by the board's own code.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from device.contract.errors import DeviceError
from device.contract.manifest import InputSpec
from device.contract.records import from_table
from device.preprocess import preprocess
from host.bench.measure import Extent, Measured, Test, look, measure
from host.bench.process import Worker
from host.bench.runtimes import NUM_SAMPLES, Subject
from host.errors import BenchError
from host.machine import describe_machine

BATCH_SIZE = 16
REPORT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One contestant: a file, and for a bundle's artifact its input and the archive of images, labels and head."""

    name: str
    runtime: str
    file: str
    data: str = ""
    input: InputSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardJob:
    """What to measure and how long."""

    entries: tuple[Entry, ...]
    queries: int
    seconds: float
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledFrames:
    """Test images uint8 [h, w, C] of any sizes, labels int64 [N], and the head: weight float32 [D, K], bias [K]."""

    images: list[np.ndarray]
    labels: np.ndarray
    head: tuple[np.ndarray, np.ndarray]

    def save(self, path: Path) -> None:
        """Write one `.npz`: pixels in a row, with the shapes that cut them."""
        pixels = np.concatenate([image.reshape(-1) for image in self.images])
        shapes = np.array([image.shape for image in self.images], np.int64)
        weight, bias = self.head
        np.savez(path, pixels=pixels, shapes=shapes, labels=self.labels, weight=weight, bias=bias)

    @classmethod
    def load(cls, path: Path) -> "LabeledFrames":
        with np.load(path) as arrays:
            shapes = arrays["shapes"]
            pieces = np.split(arrays["pixels"], np.cumsum(shapes.prod(axis=1))[:-1])
            images = [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
            return cls(images=images, labels=arrays["labels"], head=(arrays["weight"], arrays["bias"]))

    def batches(self, spec: InputSpec) -> Iterator[np.ndarray]:
        """All images as the model takes them, float32 [up to `BATCH_SIZE`, H, W, C] at a time."""
        for start in range(0, len(self.images), BATCH_SIZE):
            yield _to_input(self.images[start : start + BATCH_SIZE], spec)


def main() -> int:
    """Measure what the folder asks for; 1 and one `error:` line when that cannot be done."""
    try:
        folder = Path(sys.argv[1])
        job = from_table(BoardJob, json.loads((folder / "job.json").read_text("utf-8")), where="job", error=BenchError)
        print(json.dumps(run_job(job, folder)))
    except (BenchError, DeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_job(job: BoardJob, folder: Path) -> dict[str, Any]:
    """Measure all entries in turn; returns times and figures of each, seconds, and the machine."""
    data = [LabeledFrames.load(folder / entry.data) if entry.data else None for entry in job.entries]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(_subject(entry, images, folder, job.num_threads)))
            for entry, images in zip(job.entries, data, strict=True)
        ]
        times, seconds = measure(workers, Extent(queries=job.queries, seconds=job.seconds), report=Progress())
        measured = [
            look(worker, own, _test_of(entry, images))
            for entry, images, worker, own in zip(job.entries, data, workers, times, strict=True)
        ]
    return {"measured": [_table(each) for each in measured], "seconds": seconds, "machine": describe_machine()}


def _subject(entry: Entry, data: LabeledFrames | None, folder: Path, num_threads: int) -> Subject:
    subject = Subject(name=entry.name, path=folder / entry.file, runtime=entry.runtime, num_threads=num_threads)
    if data is None or entry.input is None:
        return subject
    chosen = np.linspace(0, len(data.images) - 1, min(len(data.images), NUM_SAMPLES)).astype(int)
    samples = _to_input([data.images[index] for index in chosen], entry.input)
    return replace(subject, images=samples, head=data.head)


def _test_of(entry: Entry, data: LabeledFrames | None) -> Test | None:
    return (data.batches(entry.input), data.labels) if data and entry.input else None


def _to_input(images: Sequence[np.ndarray], spec: InputSpec) -> np.ndarray:
    return np.concatenate([preprocess(image[None], spec) for image in images])


def _table(measured: Measured) -> dict[str, Any]:
    times = measured.times
    return asdict(measured) | {"times": {"wall": times.wall.tolist(), "processor": times.processor.tolist()}}


class Progress:
    """Says now and then how far a measurement is."""

    def __init__(self) -> None:
        self._next = time.monotonic() + REPORT_S

    def __call__(self, share: float, queries: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REPORT_S
            print(f"measuring: {share:.0%}, {queries} queries of each", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
