"""Writing checkpoints of the zoo."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from device.contract.files import write_atomic
from device.contract.records import to_table
from host.zoo import FOLDER
from host.zoo.cards import KEY, Card


def save_checkpoint(model: nn.Module, card: Card, folder: Path = FOLDER) -> Path:
    """Write a model's weights in float16, with its card; equal weights give equal bytes."""
    tensors = {name: _half(tensor) for name, tensor in model.state_dict().items()}
    path = folder / f"{card.name}.safetensors"
    write_atomic(path, save(tensors, metadata={KEY: json.dumps(to_table(card), sort_keys=True)}))
    return path


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
