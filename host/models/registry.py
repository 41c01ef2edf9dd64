"""Models by family and variant."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from host.errors import ModelError
from host.models.cnn import CNN
from host.models.efficientformer import field_32


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model: `build` takes `num_classes` and `in_chans`; images are `image_size` pixels square."""

    family: str
    variant: str
    image_size: int
    summary: str
    build: Callable[..., nn.Module]

    @property
    def name(self) -> str:
        """FAMILY/VARIANT, as messages and `fieldvit models` show it."""
        return f"{self.family}/{self.variant}"


_ENTRIES = (
    ModelEntry(
        family="cnn", variant="small", image_size=32, summary="small CNN, the teacher of the quickstart", build=CNN
    ),
    ModelEntry(
        family="efficientformer",
        variant="field-32",
        image_size=32,
        summary="our small EfficientFormer for 32-pixel images; 256 features from two depths",
        build=field_32,
    ),
)


def list_models() -> tuple[ModelEntry, ...]:
    """All models, by name."""
    return _ENTRIES


def find_model(family: str, variant: str) -> ModelEntry:
    """The entry of that name.

    Raises:
        ModelError: there is none; the message lists the names there are.
    """
    for entry in _ENTRIES:
        if (entry.family, entry.variant) == (family, variant):
            return entry
    known = ", ".join(entry.name for entry in _ENTRIES)
    raise ModelError(f"no model {family}/{variant}; choose one of {known}")


def create_model(family: str, variant: str, *, num_classes: int, in_chans: int, seed: int = 0) -> nn.Module:
    """Build a model with initial weights drawn from `seed`; the caller's random state is left alone.

    Raises:
        ModelError: no such model, or a count below 1.
    """
    entry = find_model(family, variant)
    if num_classes < 1 or in_chans < 1:
        raise ModelError(f"{entry.name}: num_classes and in_chans must be 1 or more, got {num_classes}, {in_chans}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.build(num_classes=num_classes, in_chans=in_chans)
