"""JPEGs packed into arrays of one .npz file: the sets of the data folder, decoded image by image when they are used.

Files (made for this project's benchmarks; their README says how): `cifar10_jpeg75.npz`, CIFAR-10 (Krizhevsky 2009) as
JPEG copies of quality 75, so not quite CIFAR-10; `tiny_imagenet100.npz`, 100 of the 200 classes of Tiny ImageNet
(Stanford CS231n), whose official validation images are the test set here. All of a set's JPEGs share one or two headers,
which are stored once.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from host.data.npz import open_npz
from host.data.pictures import decode
from host.data.splits import LabeledImages, Source

_RESEARCH_ONLY = "research only"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedJpegs:
    """JPEGs end to end, without the headers that they share.

    Attributes:
        content: uint8, all images.
        offsets: int [N + 1], where each begins and ends.
        headers: the bytes before an image's own.
        header_of: uint8 [N], which of the headers.
    """

    content: np.ndarray
    offsets: np.ndarray
    headers: tuple[bytes, ...]
    header_of: np.ndarray

    def __len__(self) -> int:
        return len(self.header_of)

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(io.BytesIO(self.encoded(index)))

    def encoded(self, index: int) -> bytes:
        own = self.content[self.offsets[index] : self.offsets[index + 1]]
        return self.headers[self.header_of[index]] + own.tobytes()


def read_cifar10_jpeg75(path: Path) -> Source:
    """CIFAR-10 (JPEG q75): 50,000 and 10,000 images of 32 x 32."""
    with open_npz(path) as arrays:
        headers = (arrays["jpeg_header"].tobytes(),)
        return Source(
            title=f"CIFAR-10 (JPEG q75; Krizhevsky 2009; {_RESEARCH_ONLY})",
            terms=_RESEARCH_ONLY,
            label_names=tuple(arrays["class_names"].tolist()),
            channels=3,
            train=_part(arrays, "train", headers),
            test=_part(arrays, "test", headers),
        )


def read_tiny_imagenet100(path: Path) -> Source:
    """100 classes of Tiny ImageNet: 25,000 and 5,000 images of 64 x 64."""
    with open_npz(path) as arrays:
        headers = (arrays["jpeg_header_0"].tobytes(), arrays["jpeg_header_1"].tobytes())
        return Source(
            title=f"Tiny ImageNet, 100 classes (Stanford CS231n; {_RESEARCH_ONLY})",
            terms=_RESEARCH_ONLY,
            label_names=tuple(arrays["class_names"].tolist()),
            channels=3,
            train=_part(arrays, "train", headers),
            test=_part(arrays, "val", headers),
        )


def _part(arrays: np.lib.npyio.NpzFile, part: str, headers: Sequence[bytes]) -> LabeledImages:
    labels = arrays[f"y_{part}"].astype(np.int64)
    header_of = arrays[f"{part}_header"] if f"{part}_header" in arrays else np.zeros(len(labels), np.uint8)
    return LabeledImages(
        images=PackedJpegs(
            content=arrays[f"{part}_bytes"],
            offsets=arrays[f"{part}_offset"].astype(np.int64),
            headers=tuple(headers),
            header_of=header_of,
        ),
        labels=labels,
    )
