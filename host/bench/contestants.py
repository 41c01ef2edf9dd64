"""What is measured: the artifacts of a bundle, each with its head and real images, or a file on its own."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from device.contract.bundle import extract, read_manifest
from device.contract.manifest import InputSpec
from host.bench.runtimes import NUM_SAMPLES, Subject
from host.data.inputs import to_input
from host.data.splits import LabeledImages
from host.errors import BenchError

FOREIGN = {".tflite": "tflite", ".onnx": "onnx"}
MOST_IMAGES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One row of the table.

    Attributes:
        file: name of the bundle or file.
        artifact: precision of a bundle's artifact; empty for a file on its own.
        test: images whose labels it should find; None for a file on its own, whose classes are not known.
    """

    file: str
    artifact: str
    subject: Subject
    test: tuple[LabeledImages, InputSpec] | None = None


def require_measurable(path: Path) -> None:
    """Tell of a wrong path or a missing runtime at once, before anything is measured.

    Raises:
        BenchError: there is no such file, or its runtime is not installed.
        ArtifactError: it is no sound bundle.
    """
    if path.suffix not in FOREIGN:
        read_manifest(path)
    elif not path.is_file():
        raise BenchError(f"{path}: no such file; give a bundle, a .tflite or a .onnx file")
    elif FOREIGN[path.suffix] == "onnx" and find_spec("onnxruntime") is None:
        raise BenchError(f"{path}: needs onnxruntime, which is not installed; run: pip install onnxruntime")


def find_contestants(path: Path, directory: Path, *, num_threads: int) -> list[Contestant]:
    """The contestants in one path; `directory` takes what a bundle holds."""
    if path.suffix not in FOREIGN:
        return _of_bundle(path, directory, num_threads)
    subject = Subject(name=str(path), path=path, runtime=FOREIGN[path.suffix], num_threads=num_threads)
    return [Contestant(file=path.name, artifact="", subject=subject)]


def _of_bundle(bundle: Path, directory: Path, num_threads: int) -> list[Contestant]:
    from host.bundle_checks import recipe_of  # these bring torch, which files on their own do without
    from host.stages.data import base_test_images, load_split
    from host.stages.head import load_head

    manifest = extract(bundle, directory)
    images = base_test_images(load_split(recipe_of(manifest)))
    images = images.take(_spread(len(images), MOST_IMAGES))
    samples = [images.images[index] for index in _spread(len(images), NUM_SAMPLES)]
    contestants = []
    for artifact in manifest.artifacts:
        head = load_head(directory / "head.npz", artifact.precision, shrinkage=manifest.learning.shrinkage)
        subject = Subject(
            name=f"{bundle}: {artifact.path}",
            path=directory / artifact.path,
            runtime="artifact",
            num_threads=num_threads,
            images=to_input(samples, manifest.input),
            head=(head.weight, head.bias),
        )
        test = (images, manifest.input)
        contestants.append(Contestant(file=bundle.name, artifact=artifact.precision, subject=subject, test=test))
    return contestants


def _spread(length: int, most: int) -> np.ndarray:
    """Up to `most` indices, evenly over 0..length-1."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).astype(int))
