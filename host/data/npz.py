"""Images as arrays in one .npz file, or .npz.xz: what `numpy.savez` writes. Pickled objects are refused.

Keys: `x_train`, `y_train`, and `x_test`, `y_test`, `x_val`, `y_val` where there are such splits, as Keras names them;
or `images` and `labels`; and `label_names` if the classes have names.
"""

import io
import lzma
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from host.data.splits import LabeledImages, Source
from host.errors import DataError

_PARTS = {"train": ("x_train", "y_train"), "validation": ("x_val", "y_val"), "test": ("x_test", "y_test")}
_WHOLE = {"train": ("images", "labels")}


def read_npz(path: Path) -> Source:
    """Arrays uint8 [N, h, w] or [N, h, w, 1 or 3] with integer labels 0..K-1.

    Raises:
        DataError: no such file, not an .npz, or an array is missing, unknown, of a wrong shape or type.
    """
    with open_npz(path) as arrays:
        keys = _check_keys(path, set(arrays.files))
        names = _label_names(path, arrays["label_names"]) if "label_names" in arrays.files else None
        parts = {part: _read_part(path, arrays, *pair) for part, pair in keys.items()}
    highest = min(
        int(parts["train"].labels.max()), len(parts["train"]) - 1
    )  # a label beyond that is a mistake, not a class
    num_classes = len(names) if names else highest + 1
    for part, (_, labels_key) in keys.items():
        _check_labels(path, labels_key, parts[part].labels, num_classes)
    channels = {part: images.images.shape[-1] for part, images in parts.items()}
    if len(set(channels.values())) > 1:
        raise DataError(f"{path}: the splits differ in channels ({channels}); store all as grey or all as RGB")
    return Source(
        title=path.name,
        terms="unknown",
        label_names=names or tuple(map(str, range(num_classes))),
        channels=channels["train"],
        **parts,
    )


def read_mnist(path: Path) -> Source:
    """MNIST, complete: 60,000 and 10,000 grey images of 28 x 28."""
    terms = "CC BY-SA 3.0"
    return replace(read_npz(path), title=f"MNIST (LeCun, Cortes, Burges; commonly {terms})", terms=terms)


@contextmanager
def open_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an .npz or .npz.xz file without allowing pickled objects.

    Raises:
        DataError: there is no such file, or it, or an array that is read inside the block, is damaged.
    """
    try:
        with _opened(path) as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: one array, not an .npz; write images and labels with numpy.savez")
            yield arrays
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file; name an .npz or .npz.xz file") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error}); write it again with numpy.savez") from error


def _opened(path: Path) -> BinaryIO:
    return io.BytesIO(lzma.decompress(path.read_bytes())) if path.suffix == ".xz" else path.open("rb")


def _check_keys(path: Path, keys: set[str]) -> Mapping[str, tuple[str, str]]:
    """Which arrays the splits are in; the training split first."""
    layout = _WHOLE if keys & {"images", "labels"} else _PARTS
    pairs = {part: pair for part, pair in layout.items() if part == "train" or keys & set(pair)}
    needed = {key for pair in pairs.values() for key in pair}
    unknown, missing = keys - needed - {"label_names"}, needed - keys
    if unknown or missing:
        raise DataError(
            f"{path}: {'missing ' + ', '.join(sorted(missing)) if missing else 'unknown ' + ', '.join(sorted(unknown))}; "
            "an .npz holds x_train, y_train and perhaps x_val, y_val, x_test, y_test, or images and labels, "
            "and perhaps label_names"
        )
    return pairs


def _read_part(path: Path, arrays: Mapping[str, np.ndarray], images_key: str, labels_key: str) -> LabeledImages:
    images, labels = arrays[images_key], arrays[labels_key]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"{path}: {images_key} must be uint8 [N, h, w] or [N, h, w, 1 or 3], "
            f"got {images.dtype} {list(images.shape)}; scale to 0..255 and put the channels last"
        )
    labels = labels[:, 0] if labels.shape == (len(labels), 1) else labels  # as Keras stores CIFAR's
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise DataError(
            f"{path}: {labels_key} must be integers [{len(images)}], one per image, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    return LabeledImages(images=images, labels=labels.astype(np.int64))


def _label_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) != len(names) or not len(names):
        raise DataError(f"{path}: label_names must be different strings [K], got {names.dtype} {list(names.shape)}")
    return tuple(names.tolist())


def _check_labels(path: Path, key: str, labels: np.ndarray, num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        worst = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{path}: {key} holds {worst}, but labels are 0..{num_classes - 1}; correct it or label_names")
