"""Learn the linear map from an old backbone's features to a new one's, by ridge regression in closed form.

Both backbones see the same images; labels are not used to fit. Every penalty of a grid costs one division once the
covariance is decomposed, and the best is chosen by leave-one-out error, which ridge regression has in closed form (PRESS;
Allen 1974): so all images take part in the fit, and the held-out ones in no choice. The leave-one-out errors are also what
`residual` is taken from: what the map does not explain of an image it has not seen.
"""

from dataclasses import dataclass

import numpy as np

from device.learning.projector import Projector
from host.errors import HostError

PENALTIES = np.logspace(-6, 2, 17)
"""Relative to the mean variance of an old feature."""
MIN_IMAGES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well mapped old features stand for new ones, on held-out images; see `manifest.ProjectorEntry`."""

    r2: float
    mean_cosine: float
    head_agreement: float


def fit_projector(old: np.ndarray, new: np.ndarray) -> Projector:
    """The map from features [N, D] to the features [N, E] of the same images.

    Raises:
        HostError: too few images, or features that are not finite.
    """
    if len(old) != len(new) or len(old) < MIN_IMAGES:
        raise HostError(f"a projector needs {MIN_IMAGES} or more images, got {len(old)} and {len(new)} features")
    old, new = old.astype(np.float64), new.astype(np.float64)
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise HostError("a projector cannot be learned from features that are not finite; verify both bundles")
    old_mean, new_mean = old.mean(axis=0), new.mean(axis=0)
    x, y = old - old_mean, new - new_mean
    variances, directions = np.linalg.eigh(x.T @ x / len(x))  # [D], [D, D]
    variances = np.maximum(variances, 0)
    z = x @ directions  # [N, D], uncorrelated
    cross = z.T @ y / len(x)  # [D, E]
    scale = max(float(variances.mean()), 1e-12)
    errors = [_left_out(z, y, variances, cross, penalty * scale) for penalty in PENALTIES]
    best = int(np.argmin([float((error**2).sum()) for error in errors]))
    weight = directions @ (cross / (variances + PENALTIES[best] * scale)[:, None])  # [D, E]
    residual = errors[best].T @ errors[best] / len(x)
    return Projector(weight, new_mean - old_mean @ weight, residual)


def _left_out(z: np.ndarray, y: np.ndarray, variances: np.ndarray, cross: np.ndarray, penalty: float) -> np.ndarray:
    """The error [N, E] at each image of the map that is fitted to all others."""
    shrunken = 1 / (variances + penalty)  # [D]
    leverage = (z**2 @ shrunken + 1) / len(z)  # [N], the intercept's included
    return (y - z @ (shrunken[:, None] * cross)) / np.maximum(1 - leverage, 1e-6)[:, None]


def measure_fit(projector: Projector, *, old: np.ndarray, new: np.ndarray, means: np.ndarray, mean: np.ndarray) -> Fit:
    """Judge a projector on held-out images.

    Args:
        projector: learned on others.
        old: features [n, D] of the old backbone.
        new: features [n, E] of the new one.
        means: class means [K, E] of the new backbone's training features; the nearest one is the answer.
        mean: [E], of all of them.
    """
    mapped = projector.features(old).astype(np.float64)
    new = new.astype(np.float64)
    unexplained = float(((new - mapped) ** 2).sum())
    total = float(((new - new.mean(axis=0)) ** 2).sum())
    a, b = mapped - mean, new - mean
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(lengths, 1e-12)
    return Fit(
        r2=1 - unexplained / max(total, 1e-12),
        mean_cosine=float(cosines.mean()),
        head_agreement=float((_nearest(mapped, means) == _nearest(new, means)).mean()),
    )


def class_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Means [K, E] of features [N, E], of every class there is."""
    return np.stack([features[labels == label].mean(axis=0, dtype=np.float64) for label in np.unique(labels)])


def _nearest(features: np.ndarray, means: np.ndarray) -> np.ndarray:
    return (features @ means.T - 0.5 * (means**2).sum(axis=1)).argmax(axis=1)
