"""What `fieldvit verify` measures of a bundle with tools that are none of ours: other converters and other runtimes.

The second route makes the float32 file again through ONNX, onnx2tf and TensorFlow's converter: a mistake would have to
be made by two programs that share nothing. Other runtimes run the very artifacts: tflite-runtime, as boards without a
LiteRT wheel have it, and `tf.lite`.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from converters import runners, second_route
from converters.environments import LEGACY, ONNX2TF, Environment
from converters.errors import ConversionError
from converters.isolate import opened
from device.contract.manifest import InputSpec, Manifest
from host.artifact_checks import INFER
from host.quantize.spec import FLOAT, HALF
from host.stages.features import ArrayOf
from host.stages.proof import Reference

CROSS_COLUMNS = ("artifact", "checked with", "images", "largest difference", "allowed", "verdict")
CROSS_IMAGES = 256
"""Real images that are compared, at most."""
SECOND_ROUTE_LIMIT = 1e-4
"""Largest difference of a feature between two converters, as a share of the largest: measured 4e-6 at most."""
FLOAT_RUNTIME_LIMIT = 1e-4
"""The same between two runtimes of a file whose activations are float32: measured 1e-6 at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Another program that runs TFLite files: its name, where it is installed, and what opens a file there."""

    name: str
    environment: Environment
    opener: Callable[[Path], ArrayOf]


RUNTIMES = (
    Runtime(name="tflite-runtime", environment=LEGACY, opener=runners.open_in_tflite_runtime),
    Runtime(name="tf.lite", environment=ONNX2TF, opener=runners.open_in_tensorflow),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossCheck:
    """One artifact against one other tool.

    Args:
        artifact: its precision, or `infer`; `all` where none could be checked.
        checked_with: the other tool.
        images: how many were compared; 0: none, `note` says why.
        difference: the largest, as a share of the largest value; None where nothing was compared.
        allowed: what it may be; None as above.
        problem: what is wrong, in words; empty where nothing is.
        note: why nothing was compared.
    """

    artifact: str
    checked_with: str
    images: int = 0
    difference: float | None = None
    allowed: float | None = None
    problem: str = ""
    note: str = ""

    def row(self) -> tuple[str, ...]:
        figures = ("-" if value is None else f"{value:.1e}" for value in (self.difference, self.allowed))
        verdict = self.problem or (f"not run: {self.note}" if self.note else "passed")
        return (self.artifact, self.checked_with, str(self.images), *figures, verdict)


def check_second_route(model: nn.Module, float_path: Path, reference: Reference) -> CrossCheck:
    """Convert a trained model again by the second route, and compare the features of both files on real images.

    Raises:
        MissingEnvironmentError: the second route is not installed.
        ConversionError: it does not take the model.
    """
    spec, images = reference.spec, _cross_images(reference)
    with tempfile.TemporaryDirectory(prefix="fieldvit-cross-") as temporary:
        path = Path(temporary) / "second.tflite"
        second_route.convert_backbone(model.deploy(), _input_shape(spec), path)  # type: ignore[operator]
        expected, found = _answers(float_path, images), _answers(path, images)
    return compared(FLOAT, "second route (onnx2tf)", expected, found, allowed=SECOND_ROUTE_LIMIT)


def check_runtimes(files: Mapping[str, Path], manifest: Manifest, reference: Reference) -> list[CrossCheck]:
    """Run every artifact in the other runtimes that are installed, and compare with LiteRT on the same images.

    What rounds activations differs by what its board may differ by, the manifest's golden tolerance.

    Args:
        files: TFLite files by precision, and `infer`.
        manifest: of their bundle.
        reference: its images and pre-processing.
    """
    missing = [runtime for runtime in RUNTIMES if runtime.environment.find() is None]
    checks = [_not_run(runtime) for runtime in missing]
    if len(missing) == len(RUNTIMES):
        return checks
    images = _cross_images(reference)
    for name, path in files.items():
        expected, allowed = _answers(path, images), _tolerance(name, manifest)
        present = [runtime for runtime in RUNTIMES if runtime not in missing]
        checks += [_check_runtime(name, path, runtime, images, expected, allowed) for runtime in present]
    return checks


def _not_run(runtime: Runtime) -> CrossCheck:
    environment = runtime.environment
    note = f"{environment.missing}; make it with: make {environment.target}"
    return CrossCheck(artifact="all", checked_with=runtime.name, note=note)


def _check_runtime(
    name: str, path: Path, runtime: Runtime, images: np.ndarray, expected: np.ndarray, allowed: float
) -> CrossCheck:
    try:
        found = _answers(path, images, runtime.opener, runtime.environment.require())
    except ConversionError as error:  # the other artifacts are checked all the same
        return CrossCheck(artifact=name, checked_with=runtime.name, allowed=allowed, problem=str(error))
    return compared(name, runtime.name, expected, found, allowed=allowed)


def _answers(
    path: Path,
    images: np.ndarray,
    opener: Callable[[Path], ArrayOf] = runners.open_in_litert,
    python: Path | None = None,
) -> np.ndarray:
    with opened(opener, path, python=python) as answer:
        return np.asarray(answer(images))


def compared(
    artifact: str, checked_with: str, expected: np.ndarray, found: np.ndarray, *, allowed: float
) -> CrossCheck:
    """Compare another tool's outputs [N, K] with LiteRT's, by the largest difference as a share of the largest value."""
    result = CrossCheck(artifact=artifact, checked_with=checked_with, images=len(expected), allowed=allowed)
    if found.shape != expected.shape:
        return replace(result, problem=f"gives {list(found.shape)}, LiteRT {list(expected.shape)}")
    difference = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    if not difference <= allowed:  # NaN is not
        result = replace(result, problem=f"differs from LiteRT by {difference:.1e} of the largest value")
    return replace(result, difference=difference)


def _tolerance(name: str, manifest: Manifest) -> float:
    artifact = manifest.artifacts[0] if name == INFER else manifest.artifact(name)
    return FLOAT_RUNTIME_LIMIT if artifact.precision in (FLOAT, HALF) else artifact.golden_tolerance


def _cross_images(reference: Reference) -> np.ndarray:
    """At most `CROSS_IMAGES`, evenly from all, float32 [N, H, W, C] as the bundle's record has them pre-processed."""
    chosen = reference.every(max(-(-len(reference.images) // CROSS_IMAGES), 1))
    return chosen.over(lambda images: images)


def _input_shape(spec: InputSpec) -> tuple[int, int, int, int]:
    return (1, spec.height, spec.width, spec.channels)
