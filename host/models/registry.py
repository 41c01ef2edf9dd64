"""Models by family and variant. Each family lists its own; this puts them together."""

import difflib

import torch
from torch import nn

from host.errors import ModelError
from host.models import (
    cnn,
    deit,
    efficientformer,
    efficientformerv2,
    gcab,
    mobileformer,
    mobilevit,
    nextvit,
    ninformer,
)
from host.models.entry import ModelEntry

_FAMILIES = (efficientformer, efficientformerv2, nextvit, ninformer, mobilevit, mobileformer, deit, gcab, cnn)
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
