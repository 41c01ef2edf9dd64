"""One entry point for all data: from what a recipe's `data` table says to images in their splits."""

import os
from dataclasses import replace
from pathlib import Path

from host.data.digits import read_digits
from host.data.folder import read_folder
from host.data.npz import read_mnist, read_npz
from host.data.packed import read_cifar10_jpeg75, read_tiny_imagenet100
from host.data.pictures import Progress, check_pictures
from host.data.shards import read_shards
from host.data.spec import DataSpec
from host.data.splits import ImageSplits, Source, split_source
from host.data.torchvision_sets import read_torchvision
from host.errors import DataError

_DATA_FOLDER = {
    "cifar10-jpeg75": ("cifar10_jpeg75.npz", read_cifar10_jpeg75),
    "mnist": ("mnist.npz.xz", read_mnist),
    "tiny-imagenet100": ("tiny_imagenet100.npz", read_tiny_imagenet100),
}


def load_splits(
    spec: DataSpec, *, seed: int, folder: Path | None = None, progress: Progress | None = None
) -> ImageSplits:
    """Find the images of a recipe, check them, and split what the source has not split itself.

    Equal data and seed give equal splits. A user's own pictures (folders and shards) are all decoded once, here, so
    that none stops a training later.

    Args:
        spec: the recipe's `data`.
        seed: of the split, and of the choice in a long tail.
        folder: what relative paths in `spec.source` start from; None: the working directory.
        progress: called while pictures are decoded, split after split, with how many are done and of how many.

    Raises:
        RecipeError: `held_back` does not fit the classes.
        DataError: the data cannot be found, read or split.
    """
    source = _read(spec, folder or Path())
    if spec.kind in ("folder", "shards"):
        source = _checked(source, skip=spec.unreadable == "skip", progress=progress)
    return split_source(source, spec, seed=seed)


def data_folder() -> Path:
    """Where the named sets lie: FIELDVIT_DATA, else `../shared/data` beside the repository."""
    return Path(os.environ.get("FIELDVIT_DATA") or Path(__file__).parents[3] / "shared" / "data")


def _read(spec: DataSpec, folder: Path) -> Source:
    path = folder / Path(spec.location).expanduser()
    match spec.kind:
        case "digits":
            return read_digits()
        case "folder":
            return read_folder(path)
        case "npz":
            return read_npz(path)
        case "shards":
            return read_shards(str(path))
        case "torchvision":
            return read_torchvision(spec.location)
        case name:
            return _read_named(name)


def _read_named(name: str) -> Source:
    file, read = _DATA_FOLDER[name]
    path = data_folder() / file
    if not path.is_file():
        raise DataError(f"{path} is missing; name the folder that holds {file} in FIELDVIT_DATA")
    return read(path)


def _checked(source: Source, *, skip: bool, progress: Progress | None) -> Source:
    """The source without what cannot be decoded."""
    parts, skipped = {}, ()
    for part in ("train", "validation", "test"):
        images = getattr(source, part)
        if images is not None:
            parts[part], names = check_pictures(images, images.images, skip=skip, progress=progress)
            skipped += names
    return replace(source, **parts, skipped=skipped)
