"""Data sets that torchvision downloads and checks (MD5), for machines with a network; kept for the next time.

Those whose images are arrays in memory after reading, at most 230 MB. Terms are repeated from the sets' own pages.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from host.data.splits import LabeledImages, Source
from host.errors import DataError


@dataclass(frozen=True, slots=True)
class _Set:
    """How torchvision is asked for the two splits, and what the set's page says about its use."""

    terms: str
    title: str
    splits: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})


_BY_NAME: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})

SETS = {
    "CIFAR10": _Set("research only", "CIFAR-10 (Krizhevsky 2009)"),
    "CIFAR100": _Set("research only", "CIFAR-100 (Krizhevsky 2009)"),
    "FashionMNIST": _Set("MIT", "Fashion-MNIST (Xiao et al. 2017)"),
    "KMNIST": _Set("CC BY-SA 4.0", "Kuzushiji-MNIST (Clanuwat et al. 2018)"),
    "MNIST": _Set("CC BY-SA 3.0", "MNIST (LeCun, Cortes, Burges)"),
    "STL10": _Set("research only", "STL-10 (Coates et al. 2011)", _BY_NAME),
    "SVHN": _Set("research only", "SVHN (Netzer et al. 2011)", _BY_NAME),
    "USPS": _Set("unknown", "USPS (Hull 1994)"),
}


def read_torchvision(name: str) -> Source:
    """Read a set from the cache, after downloading it there the first time.

    Raises:
        DataError: it is not in the cache and cannot be downloaded, or what came is damaged.
    """
    from host.models import torchvision_guard

    torchvision_guard.apply()
    from torchvision import datasets  # seconds, and only this source needs it

    known, root = SETS[name], cache_folder() / "torchvision"
    try:
        train, test = (getattr(datasets, name)(root, download=True, **split) for split in known.splits)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"torchvision:{name} cannot be downloaded ({_reason(error)}); "
            f"connect to the network once, or copy torchvision's files of {name} into {root}"
        ) from error
    images = _images(train)
    return Source(
        title=f"{known.title}; terms: {known.terms}",
        terms=known.terms,
        label_names=_label_names(train),
        channels=images.images.shape[-1],
        train=images,
        test=_images(test),
    )


def cache_folder() -> Path:
    """Where downloads are kept: XDG_CACHE_HOME, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fieldvit"


def _images(part: Any) -> LabeledImages:
    images = np.asarray(part.data)
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[1] == 3:  # SVHN and STL-10 put the channels first
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    labels = part.targets if hasattr(part, "targets") else part.labels
    return LabeledImages(images=images, labels=np.asarray(labels).astype(np.int64))


def _label_names(part: Any) -> tuple[str, ...]:
    """The set's own names; SVHN and USPS are digits and have none."""
    return tuple(getattr(part, "classes", None) or map(str, range(10)))


def _reason(error: Exception) -> str:
    """The last line of what may be many, one per address that was tried."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
