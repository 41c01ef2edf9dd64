"""Published weights: timm's from the hub, or a safetensors file with timm's names or ours.

Weights for other classes keep the new head's initial values; weights for colour images enter a model for grey ones as
timm does it, by summing the first convolution over its channels.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from host.errors import ModelError
from host.models.entry import ModelEntry, StateDict


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
    kept = {name for name in own if name.startswith("head.")}
    dropped = {name for name, tensor in fitted.items() if tensor is None}
    problems = sorted((own.keys() - fitted.keys() - kept) | (state.keys() - own.keys()) | (dropped - kept))
    if problems:
        raise ModelError(
            f"{where} does not fit: {', '.join(problems[:4])}{' and more' if len(problems) > 4 else ''}; "
            f"give weights of {entry.timm_name or entry.name}"
        )
    model.load_state_dict({**own, **{name: tensor for name, tensor in fitted.items() if tensor is not None}})


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
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); give the file that timm saved") from error


def _from_hub(entry: ModelEntry) -> StateDict:
    if not entry.timm_name:
        raise ModelError(f"{entry.name} has no published weights; train it, or name a safetensors file: weights = FILE")
    import timm

    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(entry.timm_name, pretrained=True).state_dict()
        except Exception as error:  # the hub's client raises its own, requests' and the system's errors
            raise ModelError(
                f"{entry.name}: the published weights of {entry.timm_name} cannot be fetched from the hub "
                f"({type(error).__name__}); connect to the network, or name a safetensors file: weights = FILE"
            ) from error
