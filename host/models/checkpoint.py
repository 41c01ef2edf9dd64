"""Weights on disk as safetensors: no pickle, whole or not at all. The header says what model they are of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import nn

from device.contract.files import write_atomic
from host.errors import ModelError
from host.models.options import build_model, with_options
from host.models.registry import find_model

_KEY = "fieldvit"  # one key only: safetensors writes several in no fixed order


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a model was built as: family, variant, and the options of `[model] options`."""

    family: str
    variant: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        record = {"family": self.family, "variant": self.variant, "options": dict(self.options)}
        return json.dumps(record, sort_keys=True)

    def __str__(self) -> str:
        return f"{self.family}/{self.variant}" + (f" with options {dict(self.options)}" if self.options else "")


def save_model(model: nn.Module, path: Path, origin: Origin | None = None) -> None:
    """Write a model's parameters and buffers, and what it was built as; equal weights give equal bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(tensors, metadata={_KEY: origin.to_json()} if origin else None))


def load_model(
    path: Path,
    family: str,
    variant: str,
    *,
    num_classes: int,
    in_chans: int,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model and load its weights, in evaluation mode.

    Args:
        path: a file of `save_model`'s, or any safetensors file with this model's names.
        family: as the registry has it; a file that names another is refused.
        variant: likewise.
        num_classes: of the head.
        in_chans: of the images.
        options: what the model was built with; None takes what the file says, and none where it says nothing.

    Raises:
        ModelError: the file is missing, damaged, or of another model.
    """
    try:
        state, stated = load(path.read_bytes()), _origin(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); train again") from error
    if options is None:
        options = stated.options if stated else {}
    wanted = Origin(family=family, variant=variant, options=options)
    if stated and stated.to_json() != wanted.to_json():
        raise ModelError(f"{path}: holds a {stated}, not a {wanted}; train again")
    entry = with_options(find_model(family, variant), options)
    model = build_model(entry, num_classes=num_classes, in_chans=in_chans)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: holds other weights than {wanted} needs ({str(error)[:200]}); train again"
        ) from error
    return model.eval()


def load_origin(path: Path) -> Origin:
    """What a file of `save_model`'s was built as.

    Raises:
        ModelError: it cannot be read, or does not say.
    """
    try:
        origin = _origin(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); name a model.safetensors that a training wrote") from error
    if origin is None:
        raise ModelError(f"{path}: does not say what model it is of; name a model.safetensors that a training wrote")
    return origin


def _origin(path: Path) -> Origin | None:
    """What the file says its model was built as; None where another program wrote it."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY, "")
    try:
        return Origin(**json.loads(text))
    except (ValueError, TypeError):
        return None
