"""Which tensor of an artifact departs first from the float model, and by how much each differs along the depth.

An error travels: behind a wrong layer every tensor is wrong. So no fixed threshold on a tensor's difference decides, but
its *own* error: its inputs agree with the reference and it does not, or, given its inputs as they are, it is not what
the float model makes of them. Floors were measured on clean conversions of small and full-size variants of the families.
"""

from dataclasses import dataclass

import numpy as np

FLOAT_LIMIT = 2e-4
"""Largest relative difference of a float32 tensor; measured on clean files: 3e-5 at most."""
HALF_LIMIT = 4e-3
"""The same of an operation with float16 weights, on equal inputs; measured on clean files: 7e-4 at most."""
_HALF_ROUNDING, _SMALLEST_HALF = 2.0**-11 * 1.02, 2.0**-24
INPUT = "INPUT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One tensor of an artifact, in the order of computation.

    Args:
        name: of the tensor in the file.
        module: the module that it belongs to, as far as names tell: dotted path, or the classes of the modules.
        kind: of the operation that makes it.
        error: largest difference from the reference, as a share of the reference's largest value; None where the
            reference has no such tensor.
        cosine_distance: 1 - cosine over all images; None as above.
        own: the part of the error that is made here, as a multiple of what the precision allows.
    """

    name: str
    module: str
    kind: str
    error: float | None
    cosine_distance: float | None
    own: float

    @property
    def place(self) -> str:
        """For people: the module, or the tensor where no module is known."""
        return self.module or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """All tensors of one artifact against a reference."""

    artifact: str
    reference: str
    layers: tuple[Layer, ...]

    @property
    def first_departed(self) -> Layer | None:
        """The first tensor that is wrong by itself; None where the artifact follows its reference."""
        return next((layer for layer in self.layers if layer.own > 1), None)

    def worst(self, count: int) -> tuple[Layer, ...]:
        """Those that are wrong by themselves, then those with the largest errors; of what has a counterpart."""
        known = [layer for layer in self.layers if layer.error is not None]
        return tuple(
            sorted(known, key=lambda layer: (-layer.own if layer.own > 1 else 0.0, -(layer.error or 0)))[:count]
        )


def input_layer(images: np.ndarray, expected: np.ndarray) -> Layer:
    """What the artifact is given, against what the model was trained on: a wrong pre-processing record shows here."""
    error = difference(images, expected)
    return Layer(
        name="images",
        module="input",
        kind=INPUT,
        error=error,
        cosine_distance=cosine_distance(images, expected),
        own=error / FLOAT_LIMIT,
    )


def difference(values: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, as a share of the largest value of the reference; infinite where something is not finite."""
    if not np.isfinite(values).all():
        return float("inf")
    largest = float(np.abs(reference).max())
    return float(np.abs(values - reference).max()) / largest if largest else float(np.abs(values).max() > 0)


def half_rounding(found: np.ndarray, expected: np.ndarray) -> float:
    """How far float16 constants are from float32 ones of the same shape, as a multiple of what rounding allows."""
    allowed = _HALF_ROUNDING * np.abs(expected, dtype=np.float64) + _SMALLEST_HALF
    return float((np.abs(found.astype(np.float64) - expected) / allowed).max())


def cosine_distance(values: np.ndarray, reference: np.ndarray) -> float:
    """1 - cosine of all values together; 1 where something is not finite."""
    a, b = values.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return 1.0
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return max(1.0 - float(a @ b) / norms, 0.0) if norms else float(a.any() != b.any())
