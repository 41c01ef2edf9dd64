"""What `fieldvit bench` measures: accuracy, latency, size and memory of a bundle's artifacts on this machine.

Artifacts take turns image by image, so a machine that slows down slows all of them; each runs on one thread. Peak memory
comes from one child process per artifact that only loads and runs it.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.contract.bundle import extract
from device.engine import Engine
from host.bundle_checks import recipe_of
from host.errors import FleetError
from host.stages.data import base_test_images, load_split
from host.stages.head import LinearHead, load_head

BENCH_COLUMNS = ("bundle", "artifact", "accuracy", "p50 ms", "p90 ms", "p99 ms", "kB", "peak MB")
_CHILD = """
import sys, numpy as np
from pathlib import Path
from device.engine import Engine
from host.memory import own_peak_bytes
engine = Engine(Path(sys.argv[1]))
for _ in range(20):
    engine.features(np.zeros(engine.input_shape("features", "images"), np.float32))
print(own_peak_bytes())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One artifact's figures; latency is backbone and head for one frame, in milliseconds."""

    bundle: str
    artifact: str
    accuracy: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    artifact_bytes: int
    peak_memory_bytes: int

    def row(self) -> tuple[str, ...]:
        times = (f"{value:.3f}" for value in (self.p50_ms, self.p90_ms, self.p99_ms))
        sizes = (f"{self.artifact_bytes / 1e3:.0f}", f"{self.peak_memory_bytes / 1e6:.0f}")
        return (self.bundle, self.artifact, f"{self.accuracy:.2%}", *times, *sizes)


@dataclass(slots=True)
class _Contestant:
    bundle: str
    precision: str
    path: Path
    engine: Engine
    head: LinearHead
    images: np.ndarray
    labels: np.ndarray
    seconds: list[float]
    hits: int = 0

    def step(self, index: int) -> None:
        started = time.perf_counter()
        logits = self.head.logits(self.engine.features(self.images[index % len(self.images)][None])[None])
        self.seconds.append(time.perf_counter() - started)
        self.hits += int(logits.argmax() == self.labels[index % len(self.images)])


def bench_bundles(bundles: list[Path], *, rounds: int) -> list[BenchRow]:
    """Measure every artifact of the bundles, interleaved, over `rounds` passes of the first bundle's test images.

    Raises:
        ArtifactError: a bundle is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="fieldvit-bench-") as temporary:
        contestants = [
            contestant
            for index, bundle in enumerate(bundles)
            for contestant in _contestants(bundle, Path(temporary) / str(index))
        ]
        for index in range(rounds * len(contestants[0].images)):
            for contestant in contestants:
                contestant.step(index)
        return [_row(contestant) for contestant in contestants]


def _contestants(bundle: Path, directory: Path) -> list[_Contestant]:
    manifest = extract(bundle, directory)
    images, labels = base_test_images(load_split(recipe_of(manifest)), manifest.input)
    return [
        _Contestant(
            bundle=bundle.name,
            precision=artifact.precision,
            path=directory / artifact.path,
            engine=Engine(directory / artifact.path),
            head=load_head(directory / "head.npz", artifact.precision, shrinkage=manifest.learning.shrinkage),
            images=images,
            labels=labels,
            seconds=[],
        )
        for artifact in manifest.artifacts
    ]


def _row(contestant: _Contestant) -> BenchRow:
    p50, p90, p99 = np.percentile(np.array(contestant.seconds) * 1e3, [50, 90, 99])
    return BenchRow(
        bundle=contestant.bundle,
        artifact=contestant.precision,
        accuracy=contestant.hits / len(contestant.seconds),
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        artifact_bytes=contestant.path.stat().st_size,
        peak_memory_bytes=_peak_memory(contestant.path),
    )


def _peak_memory(path: Path) -> int:
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise FleetError(f"{path.name}: cannot be run in a process of its own: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)
