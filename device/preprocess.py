"""Frames to model input, in NumPy: the host trains, calibrates and measures with the very code that the board runs.

Bilinear resizing uses half-pixel centres without antialiasing, as TFLite's RESIZE_BILINEAR with `half_pixel_centers`.

Every number is made by one multiplication, division, addition or subtraction of float32 at a time, which IEEE 754 rounds
in one way only: no sum whose order or fused products a processor, a batch or a version of NumPy could choose. So the
host's batch and the board's single frame agree bit for bit, also from x86 to ARM.
"""

from functools import lru_cache

import numpy as np

from device.contract.errors import FrameError
from device.contract.manifest import InputSpec


def preprocess(frames: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Resize, scale to 0..1 and normalize frames.

    Args:
        frames: uint8 [N, h, w, C], any h and w; C as the model's.
        spec: the model's input, from the manifest.

    Returns:
        float32 [N, H, W, C].

    Raises:
        FrameError: wrong rank, dtype or channel count.
    """
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[3] != spec.channels or 0 in frames.shape:
        raise FrameError(
            f"frames must be uint8 [N, h, w, {spec.channels}], got {frames.dtype} {list(frames.shape)}; "
            "decode them to 8 bits and the model's number of channels",
            reason="shape",
        )
    values: np.ndarray = resize_bilinear(frames, spec.height, spec.width)
    values /= np.float32(255)
    values -= np.asarray(spec.mean, np.float32)
    values /= np.asarray(spec.std, np.float32)
    return values


def resize_bilinear(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 or float32 [N, h, w, C] to float32 [N, height, width, C], a copy also where the size is right."""
    if images.shape[1:3] == (height, width):
        return images.astype(np.float32)
    return _interpolate(_interpolate(images, height, axis=1), width, axis=2)


def _interpolate(images: np.ndarray, target: int, *, axis: int) -> np.ndarray:
    """Between the two neighbours of each target position, in two products and a sum, each rounded to float32."""
    low, high, fraction = _neighbours(images.shape[axis], target)
    shape = [target if i == axis else 1 for i in range(images.ndim)]
    values: np.ndarray = np.multiply(images.take(low, axis), (1 - fraction).reshape(shape), dtype=np.float32)
    values += np.multiply(images.take(high, axis), fraction.reshape(shape), dtype=np.float32)
    return values


@lru_cache(maxsize=32)
def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target position the source positions below and above, and how near it is to the upper one, all [target]."""
    position = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    low = np.floor(position).astype(np.int64)
    return low, np.minimum(low + 1, source - 1), (position - low).astype(np.float32)
