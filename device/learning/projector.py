"""A linear map from an old backbone's features to a new one's, so that what was learned on the old can move.

Learned on the host by ridge regression, from images run through both backbones (`host.continual.projector`); no label and
no image of the taught class is needed. What SLDA keeps are sums, and sums go through a linear map exactly: the statistics
of mapped features are the mapped statistics, whatever was forgotten of the features since. The one thing a map takes away
is the scatter that it cannot explain; `residual` is the covariance of that, and is added once for each sample.

Linear maps between representations: Lenc & Vedaldi 2015, arXiv:1411.5908; for features of updated models, Iscen et al.
2020, arXiv:2004.00713 (who learn a network; a closed form needs no choice that could go wrong on somebody's data).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from device.contract.errors import LearningError


@dataclass(frozen=True, slots=True)
class Projector:
    """new = old @ weight + bias, with an unexplained rest of covariance `residual`; all float64.

    Shapes: weight [D, E], bias [E], residual [E, E]; D old and E new features.
    """

    weight: np.ndarray
    bias: np.ndarray
    residual: np.ndarray

    def __post_init__(self) -> None:
        ends = self.weight.shape[-1:]
        if self.weight.ndim != 2 or self.bias.shape != ends or self.residual.shape != ends * 2:
            raise LearningError(
                f"projector: weight {self.weight.shape}, bias {self.bias.shape} and residual {self.residual.shape} "
                "do not fit together; expected [D, E], [E] and [E, E]"
            )
        arrays = (self.weight, self.bias, self.residual)
        if not all(array.dtype == np.float64 and np.isfinite(array).all() for array in arrays):
            raise LearningError("projector: its numbers must be finite and float64")

    @classmethod
    def identity(cls, feature_dim: int) -> Self:
        """For the same backbone."""
        return cls(np.eye(feature_dim), np.zeros(feature_dim), np.zeros((feature_dim, feature_dim)))

    def features(self, features: np.ndarray) -> np.ndarray:
        """Map features [n, D]; returns float32 [n, E]."""
        return np.asarray(features.astype(np.float64) @ self.weight + self.bias, np.float32)

    def with_rest(self, features: np.ndarray, *, times: int, rng: "np.random.Generator") -> np.ndarray:
        """Map features [n, D] and add a draw of the rest, `times` over; returns float32 [times * n, E].

        Mapped features alone are too good to judge a head by: what the map cannot explain is missing in all of them.
        """
        variances, directions = np.linalg.eigh(self.residual)
        root = directions * np.sqrt(np.maximum(variances, 0))  # [E, E]
        mapped = np.tile(self.features(features), (times, 1))
        return np.asarray(mapped + rng.standard_normal(mapped.shape) @ root.T, np.float32)

    def statistics(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Map SLDA's counts [K], sums [K, D] and Gram matrix [D, D], as if the features themselves had been mapped."""
        counts, total = state["counts"], int(state["counts"].sum())
        moved = state["sums"].sum(axis=0) @ self.weight  # [E]
        cross = np.outer(moved, self.bias)
        gram = self.weight.T @ state["gram"] @ self.weight + cross + cross.T
        gram += total * (np.outer(self.bias, self.bias) + self.residual)
        return {
            "counts": counts.copy(),
            "sums": state["sums"] @ self.weight + counts[:, None] * self.bias,
            "gram": gram,
        }
