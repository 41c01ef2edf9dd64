"""The frames that the quickstart's board sees: PGM files that any image viewer opens."""

import os
import shutil
from pathlib import Path

import numpy as np


def write_frames(directory: Path, images: np.ndarray, names: list[str]) -> None:
    """Write uint8 [N, h, w, 1] images as `NAME.pgm`, so that the directory appears at once with all of them."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, image in zip(names, images, strict=True):
        height, width = image.shape[:2]
        (partial / f"{name}.pgm").write_bytes(b"P5\n%d %d\n255\n" % (width, height) + image.tobytes())
    os.replace(partial, directory)
