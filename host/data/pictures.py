"""Pictures as people have them, decoded to what a model sees, with the board's own code (`device.pictures`)."""

import io
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from device.pictures import upright_rgb
from host.data.spec import listed
from host.data.splits import Images, LabeledImages
from host.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
NOT_DECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged, cut off, of another kind, or far too large."""

Progress = Callable[[int, int], None]
"""Called with how many are done, and of how many."""

_THREADS = min(8, os.cpu_count() or 1)  # decoding is C code outside the interpreter's lock
_BATCH = 64


class Pictures(Images, Protocol):
    """Encoded images, each of which has a name and can be handed on as it is stored."""

    def name(self, index: int) -> str:
        """What a person finds the image by."""

    def encoded(self, index: int) -> bytes:
        """The image's file."""


def decode(file: BinaryIO | io.BytesIO) -> np.ndarray:
    """A picture as uint8 [h, w, 3].

    Raises:
        one of NOT_DECODABLE: it cannot be decoded to its end.
    """
    with Image.open(file) as picture:
        return np.asarray(upright_rgb(picture))


def check_pictures(
    images: LabeledImages, pictures: Pictures, *, skip: bool, progress: Progress | None = None
) -> tuple[LabeledImages, tuple[str, ...]]:
    """Decode every picture once, because a file that is cut off shows only then.

    JPEGs are decoded at an eighth of their size, which reads the whole file (12 megapixels: 48 ms instead of 366).

    Args:
        images: whose `images` are `pictures`.
        pictures: decoded in threads.
        skip: leave out what cannot be decoded, instead of raising.
        progress: called now and then.

    Returns:
        The images that can be decoded, and the names of the others.

    Raises:
        DataError: some cannot be decoded; the message names up to 10 of them.
    """
    starts = range(0, len(pictures), _BATCH)
    unreadable: list[int] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for start, found in zip(starts, threads.map(lambda s: list(_unreadable(pictures, s)), starts), strict=True):
            unreadable += found
            if progress:
                progress(min(start + _BATCH, len(pictures)), len(pictures))
    names = tuple(pictures.name(index) for index in unreadable)
    if names and not skip:
        raise DataError(
            f"{len(names)} of {len(pictures)} images cannot be decoded: {listed(names)}; "
            "replace or remove them, or set data.unreadable = 'skip' to leave them out"
        )
    return images.take(np.delete(np.arange(len(images)), unreadable)) if names else images, names


def _unreadable(pictures: Pictures, start: int) -> Iterator[int]:
    for index in range(start, min(start + _BATCH, len(pictures))):
        try:
            with Image.open(io.BytesIO(pictures.encoded(index))) as picture:
                picture.draft("RGB", (1, 1))
                upright_rgb(picture)
        except NOT_DECODABLE:
            yield index
