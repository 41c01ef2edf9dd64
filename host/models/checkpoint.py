"""Weights on disk as safetensors: no pickle, whole or not at all."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from device.contract.files import write_atomic
from host.errors import ModelError
from host.models.registry import create_model


def save_model(model: nn.Module, path: Path) -> None:
    """Write a model's parameters and buffers; equal weights give equal bytes."""
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))


def load_model(path: Path, family: str, variant: str, *, num_classes: int, in_chans: int) -> nn.Module:
    """Build a model and load its weights, in evaluation mode.

    Raises:
        ModelError: the file is missing, damaged, or of another model.
    """
    model = create_model(family, variant, num_classes=num_classes, in_chans=in_chans)
    try:
        model.load_state_dict(load(path.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); train again") from error
    except RuntimeError as error:
        raise ModelError(
            f"{path}: holds other weights than {family}/{variant} needs ({str(error)[:200]}); train again"
        ) from error
    return model.eval()
