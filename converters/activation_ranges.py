"""Calibration without a Mac: what goes into every convolution and linear layer, seen in PyTorch on real images.

coremltools calibrates by predicting, which only macOS can. The deploy form that is converted computes the same values,
so observers on it give the same ranges. A range is the smallest and largest value that any image gave, and always
holds 0 (padding must be exact). Clipping to the least squared error and to the 99.99th percentile were tried on the
small variant of every family: neither was closer throughout, and after training the former kept fewer answers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from converters.errors import ConversionError
from converters.prepare import DeployClassifier, evaluating

QMIN, QMAX = -128, 127


@dataclass(frozen=True, slots=True)
class AffineInt8:
    """How an activation is held in int8: value = (code - zero_point) * scale; the scale is exact in float16."""

    scale: float
    zero_point: int

    @classmethod
    def from_range(cls, low: float, high: float) -> "AffineInt8":
        """The finest codes that hold `low`, `high` and 0: a scale that float16 lacks is rounded up, never clipping."""
        low, high = min(low, 0.0), max(high, 0.0)
        exact = (high - low) / (QMAX - QMIN)
        scale = float(half_scales(np.array(exact)))
        if scale < exact:
            scale = float(np.nextafter(np.float16(scale), np.float16(np.inf)))
        return cls(scale, int(np.clip(round(QMIN - low / scale), QMIN, QMAX)))


def half_scales(scales: np.ndarray) -> np.ndarray:
    """Round scales through float16, where a half-precision program keeps them; the smallest one where that gives 0."""
    return np.maximum(scales.astype(np.float16), np.finfo(np.float16).smallest_subnormal).astype(np.float32)


@torch.no_grad()
def calibrate(model: nn.Module, layers: Mapping[str, nn.Module], images: np.ndarray) -> dict[str, AffineInt8]:
    """Find the range of every layer's input.

    Args:
        model: what will be converted.
        layers: the modules of it to observe, by name.
        images: pre-processed as the board does it, float32 [N, H, W, C].

    Raises:
        ConversionError: no images, of another rank or type, or an activation is not finite or never computed.
    """
    require_images(images)
    with evaluating(model), _observing(layers) as ranges:
        classifier = DeployClassifier(model).eval()
        for image in torch.from_numpy(images):
            classifier(image[None])
    for name in layers:
        if name not in ranges:
            raise ConversionError(f"layer {name} is not run by forward_features or head; remove it from the model")
        if not np.isfinite(ranges[name]).all():
            raise ConversionError(f"layer {name} gets values that are not finite; check the weights and the images")
    return {name: AffineInt8.from_range(*ranges[name]) for name in layers}


def require_images(images: np.ndarray) -> None:
    """Refuse what cannot be calibrated on.

    Raises:
        ConversionError: no images, or of another rank or type.
    """
    if images.ndim != 4 or not len(images) or images.dtype != np.float32:
        raise ConversionError(
            f"calibration images must be float32 [N, H, W, C] with N >= 1, got {images.dtype} {list(images.shape)}"
        )


def layers_that_see_images(model: nn.Module, layers: Mapping[str, nn.Module], image: np.ndarray) -> set[str]:
    """Names of the layers whose input follows from the image; converters fold the others, which see only weights.

    Args:
        model: in evaluation mode, without gradients of its own: what has one here has it from the image.
        layers: the modules of it to look at, by name.
        image: one, float32 [H, W, C].
    """
    found: set[str] = set()

    def observe(name: str, x: Tensor) -> None:
        if x.requires_grad:
            found.add(name)

    with torch.enable_grad(), _hooked(layers, observe):
        DeployClassifier(model).eval()(torch.from_numpy(image)[None].requires_grad_())
    return found


@contextmanager
def _observing(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[float, float]]]:
    """Keep the smallest and largest input of each layer while the block runs."""
    ranges: dict[str, tuple[float, float]] = {}

    def observe(name: str, x: Tensor) -> None:
        low, high = (float(value) for value in x.aminmax())
        before = ranges.get(name, (low, high))
        ranges[name] = (float(np.minimum(before[0], low)), float(np.maximum(before[1], high)))  # keep NaN

    with _hooked(layers, observe):
        yield ranges


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `observe(name, input)` before each layer while the block runs."""
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
