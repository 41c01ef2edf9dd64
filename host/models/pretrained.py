"""Published weights: timm's from the hub, or a safetensors file with timm's names or ours.

Weights for other classes keep the new head's initial values; weights for colour images enter a model for grey ones as
timm does it, by summing the first convolution over its channels.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from host.errors import ModelError
from host.models.entry import ModelEntry, StateDict

HEAD = "head."


def load_pretrained(model: nn.Module, entry: ModelEntry, path: Path | None = None) -> None:
    """Load published weights into `model`, built from `entry` with any number of classes and channels.

    Args:
        model: changed in place, or not at all.
        entry: says what timm calls it.
        path: a safetensors file; None asks the hub.

    Raises:
        ModelError: no such file, no network, no published weights, or weights of another model.
    """
    state = _from_hub(entry) if path is None else _from_file(path)
    where = f"{entry.name}: {path or f'the published weights of {entry.timm_name}'}"
    own = model.state_dict()
    if not state.keys() <= own.keys():
        if not entry.timm_name:
            raise ModelError(f"{where} has other names than this model, and timm has no such model to take them from")
        state = entry.from_timm(state)
    fitted = {name: _fit(tensor, own[name]) for name, tensor in state.items() if name in own}
    head = [name for name in own if name.startswith(HEAD)]
    if all(fitted.get(name) is None for name in head):  # of other classes: it starts anew, as a whole
        fitted |= {name: own[name] for name in head}
    problem = _misfit(state, own, fitted)
    if problem:
        raise ModelError(f"{where} does not fit: {problem}; give weights of {entry.timm_name or entry.name}")
    model.load_state_dict({**own, **{name: tensor for name, tensor in fitted.items() if tensor is not None}})


def _misfit(state: StateDict, own: StateDict, fitted: Mapping[str, Tensor | None]) -> str:
    """What is wrong with the weights, in words; empty where nothing is."""
    unknown = [name for name in state if name not in own and not name.startswith(HEAD)]
    missing = [name for name in own if name not in fitted]
    shapes = [name for name, tensor in fitted.items() if tensor is None]
    parts = [f"{len(names)} {what}" for names, what in ((missing, "missing"), (unknown, "unknown")) if names]
    if shapes:
        name = shapes[0]
        example = f"{name} is {list(state[name].shape)} and must be {list(own[name].shape)}"
        parts.append(f"{len(shapes)} of another shape ({example})")
    return f"of {len(own)} tensors {', '.join(parts)}" if parts else ""


def _fit(tensor: Tensor, own: Tensor) -> Tensor | None:
    """The tensor in the shape of ours: the first convolution for other channels, or None where it cannot be."""
    if tensor.shape == own.shape:
        return tensor
    is_input = tensor.ndim == own.ndim == 4 and tensor.shape[1] == 3
    if is_input and tensor.shape[0] == own.shape[0] and tensor.shape[2:] == own.shape[2:]:
        return adapt_input_conv(own.shape[1], tensor)
    return None


def _from_file(path: Path) -> StateDict:
    try:
        if path.read_bytes()[:2] in (b"PK", b"\x80\x02"):
            raise ModelError(
                f"{path}: a PyTorch checkpoint, which may hold code; load it where you trust it and save it with "
                "safetensors.torch.save_file(model.state_dict(), FILE)"
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file ({error}); copy it again, or save it with "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error


def _from_hub(entry: ModelEntry) -> StateDict:
    if not entry.timm_name:
        raise ModelError(f"{entry.name} has no published weights; train it, or name a safetensors file: weights = FILE")
    import timm

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(entry.timm_name, pretrained=True).state_dict()
        except Exception as error:  # the hub's client raises its own, requests' and the system's errors
            raise ModelError(
                f"{entry.name}: the published weights of {entry.timm_name} cannot be fetched from the hub; connect to "
                f"the network, or fetch model.safetensors of {timm.get_pretrained_cfg(entry.timm_name).hf_hub_id} "
                "elsewhere and name it: weights = FILE"
            ) from error
