"""What a recipe's `data` table may say. Reading it loads no array library: `fieldvit fleet` reads recipes too.

Numbers of classes count from 0, in the order of the source.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Self

from host.errors import RecipeError
from host.files import absolute

TORCHVISION_SETS = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "STL10", "SVHN", "USPS")
NAMED_SOURCES = ("digits", "cifar10-jpeg75", "mnist", "tiny-imagenet100")
PREFIXES = ("folder", "npz", "shards", "torchvision")
_PATHS = ("folder", "npz", "shards")
UNREADABLE = ("refuse", "skip")

_FORMS = (*NAMED_SOURCES, "folder:PATH", "npz:PATH", "shards:PATTERN", "torchvision:NAME")
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://|pipe:", re.IGNORECASE)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where the images come from, how they are split, and what training does not see.

    Attributes:
        source: `digits`, `cifar10-jpeg75`, `mnist`, `tiny-imagenet100`, `folder:PATH`, `npz:PATH`, `shards:PATTERN` or
            `torchvision:NAME`.
        held_back: classes that are left for the field to teach: names, or ranges of class numbers such as "50..99".
        validation_share: share of every base class's training images that becomes validation images, where the source
            has none of its own. None: what is usual for the source (0.1; digits 0.2). A long tail is cut from what
            is left when a share is given; with None the tail goes first (`host.data.splits`).
        test_share: share of every class that becomes test images, where the source has none of its own. None: what is
            usual for the source (0.2; digits 0.5).
        imbalance: largest over smallest training class; 1 leaves the classes as they are.
        unreadable: what becomes of images that cannot be decoded: "refuse" the data, or "skip" and name them.
    """

    source: str
    held_back: tuple[str, ...] = ()
    validation_share: float | None = None
    test_share: float | None = None
    imbalance: float = 1.0
    unreadable: str = "refuse"

    def __post_init__(self) -> None:
        _check_source(self.source)
        for name, share in (("validation_share", self.validation_share), ("test_share", self.test_share)):
            if share is not None and not 0 < share < 1:
                raise RecipeError(f"data.{name} must be above 0 and below 1, got {share}; leave it out for the default")
        if not 1 <= self.imbalance < float("inf"):
            raise RecipeError(
                f"data.imbalance must be 1 or more, got {self.imbalance}; it is the largest class over the smallest"
            )
        if self.unreadable not in UNREADABLE:
            raise RecipeError(f"data.unreadable must be {_either(UNREADABLE)}, got {self.unreadable!r}")
        if len(set(self.held_back)) != len(self.held_back):
            raise RecipeError(f"data.held_back names a class twice: {', '.join(self.held_back)}; name each once")

    @property
    def kind(self) -> str:
        """What is before the colon, or the whole name."""
        return self.source.partition(":")[0]

    @property
    def location(self) -> str:
        """What is after the colon: a path, a pattern or a name."""
        return self.source.partition(":")[2]

    @property
    def is_path(self) -> bool:
        """Whether `location` says where on this machine."""
        return self.kind in _PATHS

    def found_from(self, folder: Path) -> Self:
        """The same with its path made absolute, from the folder that the recipe lies in."""
        return replace(self, source=f"{self.kind}:{absolute(self.location, folder)}") if self.is_path else self


def held_back_labels(held_back: Sequence[str], label_names: Sequence[str]) -> list[int]:
    """The classes that `DataSpec.held_back` means, in its order. A class that is called like a range comes first.

    Raises:
        RecipeError: no such class, one named twice, or fewer than two are left for training.
    """
    labels = [label for item in held_back for label in _labels_of(item, label_names)]
    twice = [label_names[label] for label in labels if labels.count(label) > 1]
    if twice:
        raise RecipeError(f"data.held_back means class {twice[0]!r} twice; name each class once")
    if len(label_names) - len(labels) < 2:
        raise RecipeError(
            f"data.held_back leaves {len(label_names) - len(labels)} of {len(label_names)} classes for training; "
            "leave at least 2"
        )
    return labels


def suggestion(name: str, known: Sequence[str]) -> str:
    """The end of a sentence: `; did you mean 'cat'?` where something known is close, otherwise a full stop."""
    close = [k for k in known if k.lower() == name.lower()] or get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def listed(names: Sequence[str], most: int = 10) -> str:
    """Up to `most` names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _labels_of(item: str, label_names: Sequence[str]) -> Sequence[int]:
    if item in label_names:
        return [label_names.index(item)]
    numbers = _RANGE.fullmatch(item)
    if numbers is None:
        raise RecipeError(
            f"data.held_back: there is no class {item!r}{suggestion(item, label_names)} "
            f"The classes are {listed(label_names)}; ranges of class numbers are written like '5..9'"
        )
    first, last = int(numbers[1]), int(numbers[2])
    if first > last or last >= len(label_names):
        raise RecipeError(f"data.held_back: {item!r} is no range within the class numbers 0..{len(label_names) - 1}")
    return range(first, last + 1)


def _check_source(source: str) -> None:
    kind, colon, location = source.partition(":")
    if source in NAMED_SOURCES:
        return
    if kind not in PREFIXES or not colon:
        guess = suggestion(kind, (*NAMED_SOURCES, *PREFIXES))
        raise RecipeError(f"data.source {source!r} is unknown{guess} Known are {', '.join(_FORMS)}")
    if not location:
        raise RecipeError(f"data.source {source!r} names nothing after the colon; write {_form(kind)}")
    if kind == "torchvision" and location not in TORCHVISION_SETS:
        raise RecipeError(
            f"data.source {source!r}: this version does not read that set{suggestion(location, TORCHVISION_SETS)} "
            f"It reads {', '.join(TORCHVISION_SETS)}; save others as folders (folder:PATH) or arrays (npz:PATH)"
        )
    if kind != "torchvision" and _REMOTE.match(location):
        raise RecipeError(
            f"data.source {source!r} is remote; copy it to this machine, for example with "
            f"'aws s3 sync' or 'rclone copy', and name it as {_form(kind)}"
        )


def _form(kind: str) -> str:
    return next(form for form in _FORMS if form.startswith(f"{kind}:"))


def _either(choices: Sequence[str]) -> str:
    return " or ".join(map(repr, choices))
