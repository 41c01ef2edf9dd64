"""Frames to model input, in NumPy: the host trains, calibrates and measures with the very code that the board runs.

Bilinear resizing uses half-pixel centres without antialiasing, as TFLite's RESIZE_BILINEAR with `half_pixel_centers`.

Every number is made by one multiplication, division, addition or subtraction of float32 at a time, which IEEE 754 rounds
in one way only: no sum whose order or fused products a processor, a batch or a version of NumPy could choose. So the
host's batch and the board's single frame agree bit for bit, also from x86 to ARM.

Frames of the model's own size are scaled and normalized by one look-up. A table to int8 would save the artifact its first
operation, QUANTIZE, and that is all: 0.013 ms for 224x224x3, where EfficientFormer-L1 takes 107 ms (x86-64, one thread);
so the input of every artifact stays float32, which any other client can fill without knowing scales.
"""

from functools import lru_cache

import numpy as np

from device.contract.errors import FrameError
from device.contract.manifest import InputSpec

BLOCK_BYTES = 96 << 10
"""Below what an allocator asks the system for: there, each new array would cost page faults, more than its arithmetic."""


def preprocess(frames: np.ndarray, spec: InputSpec, *, out: np.ndarray | None = None) -> np.ndarray:
    """Resize, scale to 0..1 and normalize frames.

    Args:
        frames: uint8 [N, h, w, C], any h and w; C as the model's.
        spec: the model's input, from the manifest.
        out: float32 [N, H, W, C] in C order to write to, where no new memory should be touched for each frame.

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
    shape = (len(frames), spec.height, spec.width, spec.channels)
    values = np.empty(shape, np.float32) if out is None else out
    if frames.shape == shape:
        _look_up(frames, _normalized_levels(spec), values)
    else:
        _resize(frames, values)
        _normalize(values, spec)
    return values


def _normalize(values: np.ndarray, spec: InputSpec) -> None:
    values /= np.float32(255)
    values -= np.asarray(spec.mean, np.float32)
    values /= np.asarray(spec.std, np.float32)


@lru_cache(maxsize=8)
def _normalized_levels(spec: InputSpec) -> np.ndarray:
    """What each of the 256 levels of each channel becomes, [C, 256]."""
    levels = np.repeat(np.arange(256, dtype=np.float32)[:, None], spec.channels, axis=1)
    _normalize(levels, spec)
    return np.ascontiguousarray(levels.T)


def _look_up(frames: np.ndarray, levels: np.ndarray, values: np.ndarray) -> None:
    count, height, width, _ = frames.shape
    at_once = max(1, BLOCK_BYTES // (8 * count * width))  # NumPy makes indices of 8 bytes of them
    for start in range(0, height, at_once):
        block = slice(start, start + at_once)
        for channel, table in enumerate(levels):
            np.take(table, frames[:, block, :, channel], out=values[:, block, :, channel], mode="clip")


def resize_bilinear(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 or float32 [N, h, w, C] to float32 [N, height, width, C], a copy also where the size is right."""
    count, source_height, source_width, channels = images.shape
    if (source_height, source_width) == (height, width):
        return images.astype(np.float32)
    values = np.empty((count, height, width, channels), np.float32)
    _resize(images, values)
    return values


def _resize(images: np.ndarray, values: np.ndarray) -> None:
    """Into `values`, a few rows at a time: what is needed in between stays in the cache, and in memory that is at hand."""
    count, source_height, source_width, channels = images.shape
    height, width = values.shape[1:3]
    sources = images.reshape(count, source_height, source_width * channels)
    targets = values.reshape(count, height, width * channels)
    rows, columns = _neighbours(source_height, height, 1), _neighbours(source_width, width, channels)
    if 4 * count * source_width * channels > BLOCK_BYTES and source_width > 2 * width:
        sources, columns = _only_needed(
            sources, columns
        )  # a frame of one long row would cost a thousand times its bytes
    at_once = max(1, BLOCK_BYTES // (4 * count * sources.shape[2]))
    for start in range(0, height, at_once):
        block = slice(start, start + at_once)
        low, high, fraction = (part[block] for part in rows)
        tall = _between(sources.take(low, 1), sources.take(high, 1), fraction[:, None])
        low, high, fraction = columns
        targets[:, block] = _between(tall.take(low, 2), tall.take(high, 2), fraction)


def _only_needed(
    sources: np.ndarray, columns: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Those columns alone that are neighbours of a target, and where each lies now; the numbers made of them are the same."""
    low, high, fraction = columns
    places = np.arange(2 * len(low))
    return sources.take(np.concatenate([low, high]), 2), (places[: len(low)], places[len(low) :], fraction)


def _between(low: np.ndarray, high: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Two products and a sum, each rounded to float32."""
    between: np.ndarray = np.multiply(low, 1 - fraction, dtype=np.float32)
    between += np.multiply(high, fraction, dtype=np.float32)
    return between


@lru_cache(maxsize=32)
def _neighbours(source: int, target: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target position the source positions below and above, and how near it is to the upper one.

    All [target * channels]: a position's channels lie side by side, each with the same channel of its neighbours.
    """
    position = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, source - 1)
    fraction = (position - low).astype(np.float32)
    offsets = np.arange(channels)
    low, high = ((index[:, None] * channels + offsets).ravel() for index in (low, high))
    return low, high, np.repeat(fraction, channels)
