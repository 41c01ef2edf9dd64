"""The data of a recipe, and the model input that goes with it."""

from functools import lru_cache
from pathlib import Path
from statistics import fmean

import numpy as np
from torch import nn

from device.contract.manifest import InputSpec
from device.preprocess import preprocess
from host.data.digits import load_digits_split
from host.data.splits import ImageSplits
from host.models.checkpoint import load_model as load_weights
from host.models.registry import find_model
from host.recipe import Recipe

MEAN, STD = 0.3, 0.35  # of the digits' training images, rounded: fixed, so that every seed has the same input


@lru_cache(maxsize=1)
def _split(seed: int, held_back: tuple[str, ...]) -> ImageSplits:
    return load_digits_split(seed, held_back=held_back)


def load_split(recipe: Recipe) -> ImageSplits:
    """The recipe's images, split by its seed."""
    return _split(recipe.seed, recipe.data.held_back)


def input_spec(recipe: Recipe) -> InputSpec:
    """What the recipe's model takes for its data: grey digits, enlarged to the model's size.

    Published weights see the range of pixels that they were trained on.
    """
    entry = find_model(recipe.model.family, recipe.model.variant)
    mean, std = (fmean(entry.mean), fmean(entry.std)) if recipe.model.pretrained else (MEAN, STD)
    size = entry.image_size
    return InputSpec(height=size, width=size, channels=1, mean=(mean,), std=(std,), color_order="gray")


def load_model(recipe: Recipe, path: Path) -> nn.Module:
    """The recipe's model with the weights in `path`."""
    num_classes, in_chans = len(load_split(recipe).base_names), input_spec(recipe).channels
    return load_weights(path, recipe.model.family, recipe.model.variant, num_classes=num_classes, in_chans=in_chans)


def base_test_images(split: ImageSplits, spec: InputSpec) -> tuple[np.ndarray, np.ndarray]:
    """Pre-processed test images of the base classes, and their labels."""
    is_base = np.isin(split.test.labels, split.base_labels)
    return preprocess(split.test.images[is_base], spec), split.test.labels[is_base]


def describe_data(split: ImageSplits) -> str:
    """The data in words, for model cards and reports."""
    held_back = ", ".join(split.label_names[split.num_base :])
    return (
        f"scikit-learn digits (UCI optical recognition of handwritten digits, CC BY 4.0): {len(split.train)} images to train, "
        f"{len(split.validation)} to choose, {len(split.test)} to test; held back for the field: {held_back}"
    )
