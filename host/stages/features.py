"""Features of many images through each runtime: PyTorch, LiteRT, and Core ML's saved program evaluated here."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from device.contract.manifest import InputSpec
from host.data.inputs import input_batches
from host.data.splits import Images

ArrayOf = Callable[[np.ndarray], np.ndarray]
"""Pre-processed images float32 [N, H, W, C] to features float32 [N, D], or to logits [N, K]."""


def over_images(compute: ArrayOf, images: Images, spec: InputSpec) -> np.ndarray:
    """What `compute` gives for all images, a batch of inputs in memory at a time."""
    return np.concatenate([compute(batch) for batch in input_batches(images, spec)])


def torch_features(model: nn.Module) -> ArrayOf:
    """`forward_features` in evaluation mode."""
    model.eval()

    def compute(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()  # type: ignore[operator]

    return compute


def torch_logits(model: nn.Module) -> ArrayOf:
    """The model's own logits, on the device that it is on, in the mode that it is in."""
    torch_device = next(model.parameters()).device

    def compute(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2).to(torch_device)).float().cpu().numpy()

    return compute


def coreml_logits(path: Path) -> ArrayOf:
    """The saved Core ML program, evaluated here, rounding to float16 where it does."""
    from converters.mil import MilProgram

    program = MilProgram(path, round_to_half=True)
    return lambda images: program.run_many({"images": images[:, None]})["logits"][:, 0]
