"""Images in the splits that every stage uses, what each split may be used for, and how a source is split.

A source brings training images, and may bring validation and test images. What it lacks is split off class by class:
test images first, from all classes; then validation images, from the training images of the base classes. So the test
set has no part in any choice, whatever the source brings.

Long tails: the training counts are the published ones, so the tail is cut from all training images of the base
classes, and validation images come from those it leaves out: as many of every class as without a tail, where that many
are left. Of the head nothing is left, so it has no validation images then. A `validation_share` in the recipe is the
other way round: that share of every class is set aside first, and the tail is cut from the rest, n_max included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from host.data.longtail import indices_by_class, long_tail
from host.data.spec import DataSpec, held_back_labels, listed
from host.errors import DataError


class Images(Protocol):
    """Images uint8 [h, w, C] by number; h and w may differ from image to image. Arrays [N, h, w, C] are `Images`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """Some of the images of a collection, which is read only where an image is asked for."""

    images: Images
    indices: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[int(self.indices[index])]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledImages:
    """Images and labels int64 [N].

    Attributes:
        images: uint8 [N, h, w, C], or a collection that decodes an image when it is asked for.
        labels: int64 [N].
        blocks: int64 [N], or None: images of one block lie in one file, and are cheaper to read after one another.
    """

    images: Images
    labels: np.ndarray
    blocks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "LabeledImages":
        """The images at these indices int64 [n], in their order, or where a mask bool [N] is True.

        An array is copied, a collection is not.
        """
        indices = np.flatnonzero(indices) if indices.dtype == bool else indices
        return LabeledImages(
            images=_take(self.images, indices),
            labels=self.labels[indices],
            blocks=None if self.blocks is None else self.blocks[indices],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set as it was found; labels in its own order.

    Attributes:
        title: what it is, in words.
        terms: licence or terms of use of the images; "unknown" for a user's own.
        label_names: one per class.
        channels: of the images, 1 or 3.
        train: images of every class.
        validation: None where the source has no such split; the same for `test`.
        test: see `validation`.
        test_share: what is split off where there is no test set and the recipe does not say.
        validation_share: the same for validation images.
        skipped: names of images that could not be decoded and were left out.
    """

    title: str
    terms: str
    label_names: tuple[str, ...]
    channels: int
    train: LabeledImages
    validation: LabeledImages | None = None
    test: LabeledImages | None = None
    test_share: float = 0.2
    validation_share: float = 0.1
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSplits:
    """A data set, split. Labels index `label_names`: base classes first, then the classes held back for the field.

    Attributes:
        train: base classes, to train on and to calibrate with.
        validation: base classes, for every choice, and for the guard on the board.
        field: held-back classes, the pool that somebody labels in the field.
        test: all classes; for reported figures, and for no choice at all.
        label_names: one per class.
        num_base: how many of them are base classes.
        channels: of the images, 1 or 3.
        description: source, terms and counts in words, for model cards; names no folder of this machine.
        terms: licence or terms of use of the images; "unknown" for a user's own.
        skipped: names of images that could not be decoded and were left out.
    """

    train: LabeledImages
    validation: LabeledImages
    field: LabeledImages
    test: LabeledImages
    label_names: tuple[str, ...]
    num_base: int
    channels: int
    description: str
    terms: str
    skipped: tuple[str, ...] = ()

    @property
    def base_labels(self) -> np.ndarray:
        """Labels of the base classes, [num_base]."""
        return np.arange(self.num_base)

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base classes, in the order of their labels."""
        return self.label_names[: self.num_base]


class ClassCounts(NamedTuple):
    """A row of the table that says how many images of a class each split has."""

    name: str
    train: int
    validation: int
    field: int
    test: int


def class_counts(splits: ImageSplits) -> list[ClassCounts]:
    """One row per class, in the order of the labels."""
    parts = (splits.train, splits.validation, splits.field, splits.test)
    counts = [np.bincount(part.labels, minlength=len(splits.label_names)).tolist() for part in parts]
    return [ClassCounts(name, *row) for name, row in zip(splits.label_names, zip(*counts, strict=True), strict=True)]


def split_source(source: Source, spec: DataSpec, *, seed: int) -> ImageSplits:
    """Split what a source lacks, by `seed`; cut a long tail; put held-back classes last.

    Raises:
        RecipeError: `held_back` names no class of the source, or leaves fewer than two.
        DataError: a class has too few images to be in every split that it belongs to, or one lacks a class.
    """
    check_classes(source)
    held_back = held_back_labels(spec.held_back, source.label_names)
    order = [label for label in range(len(source.label_names)) if label not in held_back] + held_back
    source = _reordered(source, order)
    num_base = len(order) - len(held_back)
    parts = _split(source, spec, num_base=num_base, seed=seed)
    return ImageSplits(
        **parts,
        label_names=source.label_names,
        num_base=num_base,
        channels=source.channels,
        description=_describe(source, spec, parts, num_base=num_base),
        terms=source.terms,
        skipped=source.skipped,
    )


def check_classes(source: Source) -> None:
    """Refuse a source with one class only, with two of the same name, or with a split that lacks a class.

    Raises:
        DataError: so it is; the message names the split and the class.
    """
    names = source.label_names
    if len(names) < 2:
        raise DataError(
            f"{source.title}: {len(names)} class ({', '.join(names) or 'none'}), "
            "but a classifier needs at least 2; add images of another class"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source.title}: two classes are called {twice!r}; rename one")
    for part in ("train", "validation", "test"):
        images: LabeledImages | None = getattr(source, part)
        if images is None:
            continue
        missing = np.flatnonzero(np.bincount(images.labels, minlength=len(names)) == 0)
        if len(missing):
            raise DataError(
                f"{source.title}: class {names[missing[0]]!r} has no image in {part}; every split needs every class, "
                f"so add some there{', or remove the split: it is then split off from train' if part != 'train' else ''}"
            )


def _split(source: Source, spec: DataSpec, *, num_base: int, seed: int) -> dict[str, LabeledImages]:
    rng = np.random.default_rng(seed)
    test_share = 0.0 if source.test else _or(spec.test_share, source.test_share)
    validation_share = 0.0 if source.validation else _or(spec.validation_share, source.validation_share)
    tail_first = spec.imbalance > 1 and spec.validation_share is None and source.validation is None
    labels = source.train.labels
    chosen = _cut_classes(source, num_base, test_share, 0.0 if tail_first else validation_share, rng)
    if tail_first:
        tail, left_out = _tail_and_left_out(labels, chosen["train"], spec.imbalance, validation_share, seed)
        chosen |= {"train": tail, "validation": left_out}
    elif spec.imbalance > 1:
        chosen["train"] = chosen["train"][long_tail(labels[chosen["train"]], spec.imbalance, seed=seed)]
    parts = {name: source.train.take(rng.permutation(indices)) for name, indices in chosen.items()}
    if source.test:
        parts["test"] = source.test
    if source.validation:
        parts["validation"] = source.validation.take(source.validation.labels < num_base)
    return parts


def _cut_classes(
    source: Source, num_base: int, test_share: float, validation_share: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Which of the source's training images go into each part, class after class, each class in an order of `rng`."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "field": [], "test": []}
    for label, own in enumerate(indices_by_class(source.train.labels, len(source.label_names))):
        test, rest = _cut(rng.permutation(own), test_share)
        validation, rest = _cut(rest, validation_share if label < num_base else 0.0)
        if not len(rest):
            raise DataError(
                f"{source.title}: class {source.label_names[label]!r} has {len(own)} images, "
                "too few to be in every split; add images or leave the class out"
            )
        parts["test"].append(test)
        parts["validation"].append(validation)
        parts["train" if label < num_base else "field"].append(rest)
    return {name: np.concatenate(indices or [np.zeros(0, np.int64)]) for name, indices in parts.items()}


def _tail_and_left_out(
    labels: np.ndarray, pool: np.ndarray, imbalance: float, validation_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the long tail, and of validation images among those of `pool` that it leaves out."""
    is_kept = np.zeros(len(pool), bool)
    is_kept[long_tail(labels[pool], imbalance, seed=seed)] = True
    left_out = pool[~is_kept]
    counts = np.bincount(labels[pool])
    by_class = indices_by_class(labels[left_out], len(counts))
    chosen = [own[: max(round(n * validation_share), 1)] for own, n in zip(by_class, counts.tolist(), strict=True)]
    validation = left_out[np.concatenate(chosen)]
    if not len(validation):
        raise DataError(
            f"an imbalance of {imbalance:g} leaves no images to choose by; set data.validation_share, "
            "which sets images aside before the tail is cut"
        )
    return pool[is_kept], validation


def _cut(indices: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Part `share` from the front, at least one; nothing for a share of 0."""
    size = max(round(len(indices) * share), 1) if share else 0
    return indices[:size], indices[size:]


def _reordered(source: Source, order: Sequence[int]) -> Source:
    """The same images, with the classes in another order; `order` holds the labels of now."""
    position = np.argsort(order)
    parts = {part: getattr(source, part) for part in ("train", "validation", "test")}
    return replace(
        source,
        label_names=tuple(source.label_names[label] for label in order),
        **{n: p and replace(p, labels=position[p.labels]) for n, p in parts.items()},
    )


def _describe(source: Source, spec: DataSpec, parts: dict[str, LabeledImages], *, num_base: int) -> str:
    text = (
        f"{source.title}: {len(parts['train'])} images to train, {len(parts['validation'])} to choose, "
        f"{len(parts['test'])} to test; held back for the field: {listed(source.label_names[num_base:]) or 'none'}"
    )
    if spec.imbalance > 1:
        counts = np.bincount(parts["train"].labels, minlength=num_base)
        text += f"; long tail of imbalance {spec.imbalance:g}: {counts.max()} to {counts.min()} training images a class"
        unseen = np.flatnonzero(np.bincount(parts["validation"].labels, minlength=num_base) == 0)
        if len(unseen):
            text += f", which leaves none to choose by for {listed([source.label_names[i] for i in unseen])}"
    if source.skipped:
        text += f"; images left out because they cannot be decoded: {len(source.skipped)}"
    return text


def _take(images: Images, indices: np.ndarray) -> Images:
    if isinstance(images, np.ndarray):
        return images[indices]
    if isinstance(images, Chosen):
        return Chosen(images.images, images.indices[indices])
    return Chosen(images, indices)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
