"""Long-tailed subsets of a balanced data set: the exponential profile of the long-tail literature.

Source: Cui et al. 2019, arXiv:1901.05555 (CIFAR-LT); the same counts as in DeiT-LT, arXiv:2404.02900. There the images
are drawn by a global generator; here by the seed that is passed in.
"""

import numpy as np

from host.errors import DataError

_ROUNDING = 1e-9
"""A power that is a whole number on paper must not fall below it."""


def long_tail_counts(counts: np.ndarray, imbalance: float) -> np.ndarray:
    """How many images each class keeps: n_i = floor(n_max * imbalance ** (-i / (K - 1))), at most what it has.

    Class 0 is the head, the last class the tail; CIFAR-10 at 100 keeps 5000, 2997, 1796, ... 83, 50 (12,406 in all).

    Args:
        counts: int [K], images per class; the largest is n_max.
        imbalance: 1 or more, head over tail.

    Raises:
        DataError: a class would keep no image.
    """
    share = imbalance ** (-np.arange(len(counts)) / max(len(counts) - 1, 1))
    kept = np.minimum(np.floor(counts.max() * share + _ROUNDING).astype(np.int64), counts)
    if kept.min() < 1:
        raise DataError(
            f"an imbalance of {imbalance:g} leaves class number {int(kept.argmin())} without images, "
            f"because the largest class has {counts.max()}; lower it to {counts.max()} or less"
        )
    return kept


def long_tail(labels: np.ndarray, imbalance: float, *, seed: int) -> np.ndarray:
    """Choose a long-tailed subset; the order of the classes is the order of their labels.

    Args:
        labels: int64 [N], 0..K-1, every class at least once.
        imbalance: 1 or more, head over tail.
        seed: of the choice within each class.

    Returns:
        Indices into `labels`, ascending.
    """
    rng = np.random.default_rng(seed)
    counts = long_tail_counts(np.bincount(labels), imbalance)
    by_class = indices_by_class(labels, len(counts))
    return np.sort(np.concatenate([rng.permutation(own)[:count] for own, count in zip(by_class, counts, strict=True)]))


def indices_by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The indices of each class's images, ascending."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
