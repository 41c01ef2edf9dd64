"""What tests of data share: folders of small photos, and splits that are told apart by what is in them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from host.data.splits import ImageSplits, LabeledImages

PARTS = ("train", "validation", "field", "test")


def write_photos(folder: Path, counts: Mapping[str, int], *, kind: str = "png", first: int = 0) -> Path:
    """PATH/CLASS/NUMBER.kind; the numbers go through all classes, and are the photos' red (first 255 of them)."""
    number = first
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            Image.new("RGB", (6, 4), (number % 256, 0, 0)).save(folder / name / f"{number:04}.{kind}")
            number += 1
    return folder


def numbers(images: LabeledImages) -> list[int]:
    """The numbers of photos that `write_photos` wrote as PNG."""
    return [int(images.images[index][0, 0, 0]) for index in range(len(images))]


def parts_of(splits: ImageSplits) -> dict[str, LabeledImages]:
    """The four parts by name."""
    return {name: getattr(splits, name) for name in PARTS}


def numbered_images(num_images: int, *, size: int = 2) -> np.ndarray:
    """uint8 [N, size, size, 3]; an image's first two values are its number."""
    images = np.zeros((num_images, size, size, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(num_images) // 256, np.arange(num_images) % 256
    return images
