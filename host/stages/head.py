"""The base head of an artifact: SLDA statistics of the training images, in that artifact's own features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from device.contract.errors import ArtifactError
from device.contract.manifest import InputSpec
from device.learning.slda import SLDA
from host.data.splits import ImageSplits
from host.recipe import Recipe
from host.stages.features import ArrayOf, over_images

HEAD_IMAGES = 10_000


@dataclass(frozen=True, slots=True)
class LinearHead:
    """logits = features @ weight + bias."""

    weight: np.ndarray  # float32 [D, K]
    bias: np.ndarray  # float32 [K]

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Score features [B, D]; returns float32 [B, K]."""
        return features @ self.weight + self.bias

    def bake_into(self, model: nn.Module) -> None:
        """Make this head the model's own `head`, for artifacts that hold backbone and head in one."""
        head = nn.Linear(*self.weight.shape)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(self.weight.T))
            head.bias.copy_(torch.from_numpy(self.bias))
        model.head = head.eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedHead:
    """A learner fitted to the training images, and their features float32 [N, D]."""

    learner: SLDA
    linear: LinearHead
    features: np.ndarray


def fit_head(recipe: Recipe, split: ImageSplits, spec: InputSpec, features_of: ArrayOf) -> FittedHead:
    """Fit the recipe's learner to the training images, once through the artifact.

    Of more than `HEAD_IMAGES` training images it takes an equal share of every class: means and a covariance need no
    more, and a board's artifact works image by image.
    """
    chosen = split.train.take(balanced(split.train.labels, seed=recipe.seed))
    features = over_images(features_of, chosen.images, spec)
    learner = SLDA(len(split.base_names), features.shape[1], shrinkage=recipe.continual.shrinkage)
    learner.update(features, chosen.labels)
    return FittedHead(learner=learner, linear=LinearHead(*learner.linear()), features=features)


def balanced(labels: np.ndarray, *, seed: int) -> np.ndarray:
    """Indices int64 [n] in their order: all, or up to an equal share of `HEAD_IMAGES` of every class."""
    if len(labels) <= HEAD_IMAGES:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    share = max(HEAD_IMAGES // len(classes), 1)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:share] for label in classes]))


def load_head(path: Path, precision: str, *, shrinkage: float) -> LinearHead:
    """The base head that a bundle ships for one precision.

    Raises:
        ArtifactError: the file has no such head.
    """
    with np.load(path, allow_pickle=False) as arrays:
        prefix = f"{precision}/"
        state = {name: arrays[prefix + name] for name in ("counts", "sums", "gram") if prefix + name in arrays}
    if len(state) < 3:
        raise ArtifactError(f"{path.name}: has no head for {precision}; export the bundle again")
    learner = SLDA(len(state["counts"]), state["sums"].shape[1], shrinkage=shrinkage)
    learner.restore(state)
    return LinearHead(*learner.linear())
