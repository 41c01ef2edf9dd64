"""Models by family and variant. Each family lists its own; this puts them together."""

import difflib

from torch import nn

from host.errors import ModelError
from host.models import (
    cnn,
    deit,
    efficientformer,
    efficientformerv2,
    gcab,
    mobileformer_variants,
    mobilevit,
    nextvit,
    ninformer,
    resnet_cifar,
)
from host.models.entry import ModelEntry
from host.models.options import build_model

_FAMILIES = (
    efficientformer,
    efficientformerv2,
    nextvit,
    ninformer,
    mobilevit,
    mobileformer_variants,
    deit,
    gcab,
    cnn,
    resnet_cifar,
)
_ENTRIES = tuple(entry for family in _FAMILIES for entry in family.ENTRIES)


def list_models() -> tuple[ModelEntry, ...]:
    """All models, family by family."""
    return _ENTRIES


def find_model(family: str, variant: str) -> ModelEntry:
    """The entry of that name.

    Raises:
        ModelError: there is none; the message lists the families, or the family's variants.
    """
    for entry in _ENTRIES:
        if (entry.family, entry.variant) == (family, variant):
            return entry
    name = f"{family}/{variant}"
    meant = difflib.get_close_matches(name.lower(), [entry.name for entry in _ENTRIES], n=1)
    hint = f"; did you mean {meant[0]}?" if meant and variant else ""
    variants = [entry.variant for entry in _ENTRIES if entry.family == family]
    if variants:
        raise ModelError(f"no model {name.rstrip('/')}; variants of {family} are {', '.join(variants)}{hint}")
    families = ", ".join(dict.fromkeys(entry.family for entry in _ENTRIES))
    raise ModelError(f"no model {name}; families are {families}; 'fieldvit models' lists all{hint}")


def create_model(family: str, variant: str, *, num_classes: int, in_chans: int, seed: int = 0) -> nn.Module:
    """`build_model` by name.

    Raises:
        ModelError: no such model, or a count below 1.
    """
    return build_model(find_model(family, variant), num_classes=num_classes, in_chans=in_chans, seed=seed)
