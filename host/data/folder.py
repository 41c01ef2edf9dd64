"""A folder of photos, one folder per class: PATH/CLASS/photo.jpg, or PATH/train/CLASS/..., PATH/val/..., PATH/test/....

The layout of torchvision's ImageFolder, but photos lie directly in their class's folder, and what could be lost without
notice is refused. `train`, `val` (or `validation`, `valid`) and `test` are known in any case of letters; a folder counts
as such only if it holds folders, so a class may be called "train". Hidden files and folders, and files that are no
images, are not looked at. Everything is sorted by name: the order of the file system plays no part.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from host.data.pictures import EXTENSIONS, NOT_DECODABLE, decode
from host.data.spec import listed
from host.data.splits import LabeledImages, Source
from host.errors import DataError

PART_OF = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""How folders, and shards, of a split are called."""

_OTHER_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".jp2", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Photos:
    """Image files below a folder, decoded when they are asked for."""

    root: Path
    names: np.ndarray  # bytes [N], relative to root: an array, because a list of a million strings is copied by workers

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            with self._path(index).open("rb") as file:
                return decode(file)
        except NOT_DECODABLE as error:
            raise DataError(f"{self._path(index)}: cannot be decoded ({error}); replace or remove it") from error

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def encoded(self, index: int) -> bytes:
        return self._path(index).read_bytes()

    def _path(self, index: int) -> Path:
        return self.root / self.name(index)


def read_folder(path: Path) -> Source:
    """Find the photos of every class; none is decoded here.

    Raises:
        DataError: no folder, no classes, a class without photos, other classes in one split than in another, or
            images that this version cannot read.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise DataError(f"{path}: {what}; name a folder that holds one folder per class")
    path = Path(os.path.abspath(path))  # has a name even if the recipe says "." or ".."
    parts = _part_folders(path) or {"train": path}
    classes = {part: _class_names(folder) for part, folder in parts.items()}
    for part, names in classes.items():
        _check_same_classes(path, classes["train"], part, names)
    return Source(
        title=f"folder {path.name!r}",
        terms="unknown",
        label_names=tuple(classes["train"]),
        channels=3,
        **{part: _read_part(path, folder, classes["train"]) for part, folder in parts.items()},
    )


def _part_folders(path: Path) -> dict[str, Path]:
    """The folders of the splits, where there are such."""
    found: dict[str, Path] = {}
    for name in _folders(path):
        part = PART_OF.get(name.lower())
        if part is None or not _folders(path / name):
            continue
        if part in found:
            raise DataError(f"{path}: both {found[part].name!r} and {name!r} are {part} images; keep one of them")
        found[part] = path / name
    if found and "train" not in found:
        names = ", ".join(repr(folder.name) for folder in found.values())
        raise DataError(f"{path}: holds {names} but no 'train'; add a folder 'train' with one folder per class")
    return found


def _class_names(folder: Path) -> list[str]:
    names = _folders(folder)
    if not names:
        hint = "sort its images into one folder per class" if _image_names(folder) else "add one folder per class"
        raise DataError(f"{folder}: holds no folders; {hint}")
    return names


def _check_same_classes(path: Path, expected: Sequence[str], part: str, names: Sequence[str]) -> None:
    extra, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    if extra or missing:
        only = f"only in {part}: {listed(extra)}" if extra else f"only in train: {listed(missing)}"
        raise DataError(f"{path}: train and {part} differ in their classes ({only}); give both the same folders")


def _read_part(root: Path, folder: Path, classes: Sequence[str]) -> LabeledImages:
    names: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = [os.fsencode((folder / name / image).relative_to(root)) for image in _class_images(folder / name)]
        names += own
        labels += [label] * len(own)
    return LabeledImages(images=Photos(root, np.array(names)), labels=np.array(labels, np.int64))


def _class_images(folder: Path) -> list[str]:
    inner = _folders(folder)
    if inner:
        raise DataError(
            f"{folder}: holds the folder {inner[0]!r}; images lie directly in their class's folder: "
            "move them up, or name the folder that holds the classes"
        )
    images = _image_names(folder)
    others = [name for name in images if not name.lower().endswith(EXTENSIONS)]
    if others:
        raise DataError(
            f"{folder}: {len(others)} images of kinds that are not read ({listed(others)}); "
            f"convert them to {', '.join(EXTENSIONS)}, or move them away"
        )
    if not images:
        raise DataError(
            f"{folder}: class {folder.name!r} has no images ({', '.join(EXTENSIONS)}); add some or remove it"
        )
    return images


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _image_names(path: Path) -> list[str]:
    kinds = (*EXTENSIONS, *_OTHER_IMAGES)
    with os.scandir(path) as entries:
        names = (entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
        return sorted(name for name in names if name.lower().endswith(kinds))
