"""Prove an artifact on this board: a few real frames with the outputs that this very artifact gave on the host.

`golden.npz` holds `frames` uint8 [n, h, w, C] and, per precision, `PRECISION/features` [n, D] and `PRECISION/logits`
[n, K] of the classes the bundle ships with. Kernels round differently on ARM and x86, hence a tolerance on features;
the answers must be the same.
"""

import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from device.backbone import Backbone
from device.contract.errors import ArtifactError
from device.contract.manifest import Artifact, InputSpec, Manifest
from device.learning.slda import SLDA
from device.preprocess import preprocess

GOLDEN_NAME = "golden.npz"
LABELS_NAME = "labels.txt"
HEAD_TOLERANCE = 0.01
"""How far the head's logits of the golden features may be off, relative to the largest: it is arithmetic, the same everywhere."""
DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)
"""What NumPy raises on a damaged .npz; a MemoryError where an array says that it has more than there is."""


def read_arrays(file: Path | BinaryIO, *, name: Path | None = None) -> dict[str, np.ndarray]:
    """Read a .npz whole, without pickle, and without compression: else a few bytes could fill the memory.

    Args:
        file: where it is, or its content.
        name: what to call it in messages, where that is not its path.

    Raises:
        ArtifactError: missing or damaged.
    """
    path = name or file
    try:
        with zipfile.ZipFile(file) as archive:
            if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
                raise ArtifactError(f"{path}: {packed[0]} is compressed; write it with numpy.savez")
            damaged = archive.testzip()  # before parsing: a flipped bit in a header could ask for any amount of memory
        if damaged:
            raise ArtifactError(f"{path}: {damaged} is damaged")
        if not isinstance(file, Path):
            file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except DAMAGE as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def arrays_under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays named `PREFIX/...`, without the prefix."""
    return {name.removeprefix(f"{prefix}/"): array for name, array in arrays.items() if name.startswith(f"{prefix}/")}


def check_labels(slot: Path, manifest: Manifest) -> None:
    """The labels of other tools and those of this agent must be the same; ArtifactError when they are not."""
    if LABELS_NAME in manifest.files:
        lines = (slot / LABELS_NAME).read_bytes().decode(errors="replace").splitlines()
        if tuple(lines) != manifest.labels:
            raise ArtifactError(f"{LABELS_NAME}: its lines are not the manifest's labels; export the bundle again")


def check_golden(engine: Backbone, slot: Path, spec: InputSpec, artifact: Artifact, base_head: SLDA) -> float:
    """Run the golden frames; returns the largest difference of a feature, relative to the largest golden value.

    Raises:
        ArtifactError: a feature differs by more than the artifact's tolerance, or an answer differs.
    """
    arrays = read_arrays(slot / GOLDEN_NAME)
    try:
        frames = arrays["frames"]
        expected = arrays[f"{artifact.precision}/features"]
        logits = arrays[f"{artifact.precision}/logits"]
    except KeyError as error:
        raise ArtifactError(f"{slot / GOLDEN_NAME}: has no {error}; export the bundle again") from error
    _require_golden(frames, expected, logits, artifact, base_head)
    features = np.stack([engine.features(preprocess(frame[None], spec)) for frame in frames])
    if features.shape != expected.shape:
        raise ArtifactError(f"{artifact.path}: golden features have shape {features.shape}, expected {expected.shape}")
    if not np.isfinite(features).all():
        raise ArtifactError(
            f"{artifact.path}: golden frames give features that are not finite; its weights are damaged"
        )
    difference = float(np.abs(features - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if not difference <= artifact.golden_tolerance:
        raise ArtifactError(
            f"{artifact.path}: golden features differ by {difference:.2g} of their largest value, "
            f"{artifact.golden_tolerance:.2g} is allowed; this board computes something else than the host did"
        )
    weight, bias = base_head.linear()  # [D, K], [K]
    head_difference = float(np.abs(expected @ weight + bias - logits).max() / max(float(np.abs(logits).max()), 1e-12))
    if not head_difference <= HEAD_TOLERANCE:
        raise ArtifactError(
            f"{artifact.path}: the head's golden logits differ by {head_difference:.2g} of their largest value, "
            f"{HEAD_TOLERANCE:.2g} is allowed; head and golden outputs do not belong together"
        )
    wrong = int(((features @ weight + bias).argmax(axis=1) != logits.argmax(axis=1)).sum())
    if wrong:
        raise ArtifactError(
            f"{artifact.path}: {wrong} of {len(frames)} golden frames get another answer than on the host"
        )
    return difference


def _require_golden(
    frames: np.ndarray, expected: np.ndarray, logits: np.ndarray, artifact: Artifact, base_head: SLDA
) -> None:
    """Golden outputs that are empty, or no numbers, would agree with anything."""
    count = len(frames) if frames.ndim == 4 else 0
    wanted = (count, base_head.feature_dim), (count, base_head.num_classes)
    is_shaped = count > 0 and (expected.shape, logits.shape) == wanted
    is_typed = all(array.dtype.kind == "f" and np.isfinite(array).all() for array in (expected, logits))
    if not (is_shaped and is_typed):
        raise ArtifactError(
            f"{GOLDEN_NAME}: {artifact.precision} has frames {frames.shape}, features {expected.shape} {expected.dtype}, "
            f"logits {logits.shape} {logits.dtype}; expected finite floats of shapes {wanted[0]} and {wanted[1]}"
        )
