"""The data of a recipe, and the model input that goes with it."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import numpy as np
from torch import nn

from device.contract.manifest import InputSpec
from host.data.sources import load_splits
from host.data.spec import DataSpec
from host.data.splits import ImageSplits, LabeledImages
from host.models.checkpoint import load_model as load_weights
from host.models.entry import ModelEntry
from host.models.options import with_options
from host.models.registry import find_model
from host.recipe import ModelSpec, Recipe

DIGITS_MEAN, DIGITS_STD = 0.3, 0.35  # of their training images, rounded: fixed, so that every seed has the same input
_SAMPLED = 8


@lru_cache(maxsize=1)
def _splits(spec: DataSpec, seed: int) -> ImageSplits:
    return load_splits(spec, seed=seed)


def load_split(recipe: Recipe) -> ImageSplits:
    """The recipe's images, split by its seed."""
    return _splits(recipe.data, recipe.seed)


def data_digest(split: ImageSplits) -> str:
    """SHA-256 of the classes, of all labels and of a few images of every part: what a finished stage was made from."""
    digest = hashlib.sha256(json.dumps([split.label_names, split.num_base, split.description]).encode())
    for part in (split.train, split.validation, split.field, split.test):
        digest.update(part.labels.astype(np.int64).tobytes())
        for index in np.linspace(0, len(part) - 1, _SAMPLED).astype(int) if len(part) else ():
            digest.update(np.ascontiguousarray(part.images[int(index)]).tobytes())
    return digest.hexdigest()


def model_entry(model: ModelSpec) -> ModelEntry:
    """What is known of a recipe's model, options included."""
    return with_options(find_model(model.family, model.variant), model.options)


def input_spec(recipe: Recipe) -> InputSpec:
    """What the recipe's model takes for its data, enlarged or reduced to the model's size.

    Pixels have the range that the model's published weights, if there are any, were trained on.
    """
    entry, channels = model_entry(recipe.model), load_split(recipe).channels
    size = entry.image_size
    if channels == 3:
        return InputSpec(height=size, width=size, channels=3, mean=entry.mean, std=entry.std, color_order="rgb")
    mean, std = fmean(entry.mean), fmean(entry.std)
    if recipe.data.source == "digits" and not recipe.model.pretrained:
        mean, std = DIGITS_MEAN, DIGITS_STD
    return InputSpec(height=size, width=size, channels=1, mean=(mean,), std=(std,), color_order="gray")


def load_model(recipe: Recipe, path: Path) -> nn.Module:
    """The recipe's model with the weights in `path`."""
    num_classes, in_chans = len(load_split(recipe).base_names), input_spec(recipe).channels
    model = recipe.model
    return load_weights(
        path, model.family, model.variant, num_classes=num_classes, in_chans=in_chans, options=model.options
    )


def base_test_images(split: ImageSplits) -> LabeledImages:
    """The test images of the base classes."""
    return split.test.take(np.isin(split.test.labels, split.base_labels))
