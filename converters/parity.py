"""How closely an artifact follows its reference, on real images."""

from dataclasses import dataclass

import numpy as np

from converters.errors import ParityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Agreement of two [N, K] arrays. `argmax_agreement` is a share; cosines are per image, over the last axis."""

    argmax_agreement: float
    min_cosine: float
    mean_cosine: float
    max_abs_difference: float
    images: int


def compare(reference: np.ndarray, outputs: np.ndarray) -> Parity:
    """Compare outputs (features or logits) with the reference, image by image.

    Raises:
        ParityError: shapes differ, there are no images, or a value is not finite.
    """
    reference, outputs = np.asarray(reference, np.float64), np.asarray(outputs, np.float64)
    if reference.shape != outputs.shape or reference.ndim != 2 or reference.size == 0:
        raise ParityError(
            f"cannot compare outputs {list(outputs.shape)} with reference {list(reference.shape)}; give both as [N, K]"
        )
    for name, values in (("reference", reference), ("outputs", outputs)):
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise ParityError(f"{name} of image {bad} hold NaN or infinity; the artifact must not be shipped")
    cosines = _cosines(reference, outputs)
    return Parity(
        argmax_agreement=float((reference.argmax(axis=1) == outputs.argmax(axis=1)).mean()),
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_abs_difference=float(np.abs(reference - outputs).max()),
        images=len(reference),
    )


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row; two zero rows agree, a zero row and another do not."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)  # [N]
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0))
