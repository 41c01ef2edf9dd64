"""Streaming linear discriminant analysis (SLDA): new classes from a few features, without images and without rehearsal.

Every class is a Gaussian with its own mean and one shared covariance, so the classifier is one linear layer. Counts,
sums and the Gram matrix are all that is kept. They are plain sums: the order of the samples does not matter, and the
statistics of several boards add up to those of one board that saw everything (a shared start is subtracted as easily).

Source: Hayes & Kanan 2020, arXiv:1909.01520, and the authors' code, tyler-hayes/Deep_SLDA. Their recursion weighs a
sample by the number of all samples seen, which makes the covariance depend on the order; weighing by the number of the
class's own samples gives exactly the covariance within classes, and so do the sums here. Priors are equal: a class
taught with 20 images competes with one trained on hundreds. Shrinkage is relative to the mean variance, so features may
have any scale.
"""

import copy
from collections.abc import Mapping

import numpy as np

from device.contract.errors import LearningError

UNTAUGHT_BIAS = -1e9
"""Bias of a class that nobody taught: it cannot win. Finite, because the head also runs as a TFLite graph."""

VARIANCE_FLOOR = 1e-4
"""Least variance along any direction: identical samples must not give a singular matrix."""

_ROUNDING = 1e-12
"""The scatter is a difference of sums; this share of the mean square is lost to rounding and counts as variance."""


class SLDA:
    """Classify features by streaming LDA. Statistics are float64; the linear head is float32."""

    def __init__(self, num_classes: int, feature_dim: int, *, shrinkage: float) -> None:
        self.shrinkage = shrinkage
        self.counts = np.zeros(num_classes, dtype=np.int64)  # [K]
        self.sums = np.zeros((num_classes, feature_dim))  # [K, D]
        self.gram = np.zeros((feature_dim, feature_dim))  # [D, D], sum of z zᵀ

    @property
    def num_classes(self) -> int:
        """K, taught or not."""
        return len(self.counts)

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.sums.shape[1]

    def add_class(self) -> int:
        """Make room for one more class, not taught yet; returns its label."""
        self.counts = np.append(self.counts, 0)
        self.sums = np.vstack([self.sums, np.zeros(self.feature_dim)])
        return self.num_classes - 1

    def update(self, features: np.ndarray, labels: np.ndarray) -> None:
        """Learn features [B, D] with labels [B].

        Raises:
            LearningError: wrong shape, a feature that is not finite, or a label outside 0..K-1; nothing was learned.
        """
        features = self._require_features(features)
        labels = self._require_labels(labels, len(features))
        np.add.at(self.counts, labels, 1)
        np.add.at(self.sums, labels, features)
        self.gram += features.T @ features

    def without(self, features: np.ndarray, labels: np.ndarray) -> "SLDA":
        """What this learner would be, had it never seen these samples [B, D] with labels [B], which it has learned."""
        other = copy.deepcopy(self)
        features = features.astype(np.float64)
        np.subtract.at(other.counts, labels, 1)
        np.subtract.at(other.sums, labels, features)
        other.gram -= features.T @ features
        return other

    def merge(self, other: "SLDA") -> None:
        """Add what another learner has seen, as if this one had seen it; both must have the same classes.

        Raises:
            LearningError: they differ in classes or feature dimension.
        """
        if self.sums.shape != other.sums.shape:
            raise LearningError(f"cannot merge statistics of shape {other.sums.shape} into {self.sums.shape}")
        self.counts = self.counts + other.counts
        self.sums = self.sums + other.sums
        self.gram = self.gram + other.gram

    def covariance(self) -> np.ndarray:
        """Covariance within classes [D, D], before shrinkage; zeros before the first sample."""
        class_part = (self.sums / np.maximum(self.counts, 1)[:, None]).T @ self.sums
        return np.asarray((self.gram - class_part) / max(int(self.counts.sum()), 1))

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """The classifier as one linear layer, logits = features @ weight + bias: float32 weight [D, K] and bias [K].

        What all classes' logits have in common is left out. It changes no answer, but it can be thousands of times the
        differences, which float16 on a phone would then lose.
        """
        taught = self.counts > 0
        means = self.sums / np.maximum(self.counts, 1)[:, None]  # [K, D]
        centre = means[taught].mean(axis=0) if taught.any() else np.zeros(self.feature_dim)
        offsets = np.where(taught[:, None], means - centre, 0)  # [K, D]
        weight = np.linalg.solve(self._shrunken(), offsets.T)  # [D, K]
        bias = -0.5 * ((means + centre).T * weight).sum(axis=0)  # [K]
        bias[~taught] = UNTAUGHT_BIAS
        return weight.astype(np.float32), bias.astype(np.float32)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Score features [B, D]; returns [B, K]. The differences are log-likelihood ratios."""
        weight, bias = self.linear()
        return np.asarray(self._require_features(features).astype(np.float32) @ weight + bias)

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all statistics, for `restore`; they add up across boards key by key."""
        return {"counts": self.counts.copy(), "sums": self.sums.copy(), "gram": self.gram.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over statistics from `state`; the number of classes becomes theirs.

        Raises:
            LearningError: missing or foreign arrays, another feature dimension, or values that cannot be statistics.
        """
        if set(state) != {"counts", "sums", "gram"}:
            raise LearningError(
                f"an SLDA state holds counts, sums and gram, got {', '.join(sorted(state)) or 'nothing'}"
            )
        counts, sums, gram = (np.array(state[name]) for name in ("counts", "sums", "gram"))
        dim = self.feature_dim
        if counts.ndim != 1 or sums.shape != (len(counts), dim) or gram.shape != (dim, dim):
            raise LearningError(
                f"SLDA state has counts {counts.shape}, sums {sums.shape}, gram {gram.shape}; "
                f"expected [K], [K, {dim}], [{dim}, {dim}]: it was learned on another backbone"
            )
        if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
            raise LearningError("SLDA state: counts must be integers of 0 or more")
        if not (np.isfinite(sums).all() and np.isfinite(gram).all()):
            raise LearningError("SLDA state: sums and gram must be finite numbers")
        self.counts, self.sums, self.gram = counts.astype(np.int64), sums.astype(np.float64), gram.astype(np.float64)

    def _shrunken(self) -> np.ndarray:
        """The shrunken covariance [D, D]; the floor is above what rounding may have made negative."""
        covariance = self.covariance()
        mean_variance = max(float(np.trace(covariance)), 0.0) / self.feature_dim
        floor = VARIANCE_FLOOR + _ROUNDING * np.trace(self.gram) / max(int(self.counts.sum()), 1)
        shrunken = (1 - self.shrinkage) * covariance
        shrunken[np.diag_indices(self.feature_dim)] += self.shrinkage * mean_variance + floor
        return np.asarray(shrunken)

    def _require_features(self, features: np.ndarray) -> np.ndarray:
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise LearningError(f"features must be [B, {self.feature_dim}], got {list(features.shape)}")
        if not np.isfinite(features).all():
            raise LearningError("features must be finite numbers")
        return features

    def _require_labels(self, labels: np.ndarray, count: int) -> np.ndarray:
        labels = np.asarray(labels)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise LearningError(f"labels must be {count} integers, got {labels.dtype} {list(labels.shape)}")
        if count and not 0 <= labels.min() <= labels.max() < self.num_classes:
            wrong = labels[(labels < 0) | (labels >= self.num_classes)][0]
            raise LearningError(f"label {wrong} is outside 0..{self.num_classes - 1}; add the class first")
        return labels
