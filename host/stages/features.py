"""Features of many images through each runtime: PyTorch, LiteRT, and Core ML's saved program evaluated here."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from device.engine import Engine

FeaturesOf = Callable[[np.ndarray], np.ndarray]
"""Pre-processed images float32 [N, H, W, C] to features float32 [N, D]."""


def torch_features(model: nn.Module, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """Run `forward_features` in evaluation mode on float32 [N, H, W, C]; returns float32 [N, D]."""
    model.eval()
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
    with torch.inference_mode():
        return torch.cat([model.forward_features(batch) for batch in batches]).numpy()  # type: ignore[operator]


def tflite_features(path: Path, images: np.ndarray) -> np.ndarray:
    """Run the `features` signature image by image, as a board does, on float32 [N, H, W, C]; returns float32 [N, D]."""
    engine = Engine(path)
    return np.stack([engine.features(image[None]) for image in images])


def coreml_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Evaluate the saved Core ML program, rounding to float16 where it does, on float32 [N, H, W, C]; returns [N, K]."""
    from converters.mil import MilProgram

    program = MilProgram(path, round_to_half=True)
    return program.run_many({"images": images[:, None]})["logits"][:, 0]
