"""Frames to model input, in NumPy: the host trains, calibrates and measures with the very code that the board runs.

Bilinear resizing uses half-pixel centres without antialiasing, as TFLite's RESIZE_BILINEAR with `half_pixel_centers`.
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
            "decode them to 8 bits and the model's number of channels"
        )
    resized = resize_bilinear(frames.astype(np.float32), spec.height, spec.width)
    mean = np.asarray(spec.mean, np.float32)
    std = np.asarray(spec.std, np.float32)
    return np.asarray((resized / np.float32(255) - mean) / std)


def resize_bilinear(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize float32 [N, h, w, C] to [N, height, width, C]; images of that size stay as they are."""
    if images.shape[1:3] == (height, width):
        return images
    rows = _interpolation_matrix(images.shape[1], height)  # [H, h]
    columns = _interpolation_matrix(images.shape[2], width)  # [W, w]
    tall = np.einsum("Hh,nhwc->nHwc", rows, images)
    return np.asarray(np.einsum("Ww,nHwc->nHWc", columns, tall))


@lru_cache(maxsize=32)
def _interpolation_matrix(source: int, target: int) -> np.ndarray:
    position = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, source - 1)
    fraction = (position - low).astype(np.float32)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target), low), 1 - fraction)
    np.add.at(matrix, (np.arange(target), high), fraction)
    matrix.setflags(write=False)
    return matrix
