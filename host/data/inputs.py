"""Images as a model takes them: with the board's own pre-processing, all at once or a batch at a time."""

from collections.abc import Iterator, Sequence

import numpy as np

from device.contract.manifest import InputSpec
from device.preprocess import preprocess, resize_bilinear
from host.data.splits import Images

BATCH_SIZE = 256


def to_input(images: Sequence[np.ndarray] | np.ndarray, spec: InputSpec) -> np.ndarray:
    """Images uint8 [h, w, C] of any sizes as float32 [N, H, W, C]."""
    if isinstance(images, np.ndarray) or len({image.shape for image in images}) == 1:
        return preprocess(np.asarray(images), spec)
    return np.concatenate([preprocess(image[None], spec) for image in images])


def input_batches(images: Images, spec: InputSpec, *, batch_size: int = BATCH_SIZE) -> Iterator[np.ndarray]:
    """All images in their order, float32 [up to `batch_size`, H, W, C] at a time: no more is in memory."""
    for start in range(0, len(images), batch_size):
        yield to_input([images[index] for index in range(start, min(start + batch_size, len(images)))], spec)


def same_size(images: Sequence[np.ndarray], spec: InputSpec) -> np.ndarray:
    """Images uint8 [h, w, C] as one array [N, h, w, C]; where sizes differ, all are resized to the model's."""
    if len({image.shape for image in images}) == 1:
        return np.stack(images)
    resized = [resize_bilinear(image[None].astype(np.float32), spec.height, spec.width)[0] for image in images]
    return np.rint(resized).clip(0, 255).astype(np.uint8)
