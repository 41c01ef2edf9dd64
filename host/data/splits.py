"""Images in the splits that every stage uses, and what each split may be used for."""

from dataclasses import dataclass

import numpy as np

from host.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledImages:
    """Images uint8 [N, h, w, C] and labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


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
    """

    train: LabeledImages
    validation: LabeledImages
    field: LabeledImages
    test: LabeledImages
    label_names: tuple[str, ...]
    num_base: int

    @property
    def base_labels(self) -> np.ndarray:
        """Labels of the base classes, [num_base]."""
        return np.arange(self.num_base)

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base classes, in the order of their labels."""
        return self.label_names[: self.num_base]


def split_images(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    label_names: tuple[str, ...],
    num_base: int,
    seed: int,
    test_share: float = 0.5,
    validation_share: float = 0.2,
) -> ImageSplits:
    """Split class by class, in an order drawn from `seed`.

    Args:
        images: uint8 [N, h, w, C].
        labels: int64 [N], indices of `label_names`.
        label_names: base classes first.
        num_base: how many of them are base classes.
        seed: of the order.
        test_share: share of every class that becomes test images.
        validation_share: share of a base class's other images that become validation images.

    Raises:
        DataError: a class has too few images to be in every split it belongs to.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "field": [], "test": []}
    for label, name in enumerate(label_names):
        order = rng.permutation(np.flatnonzero(labels == label))
        if len(order) < 4:
            raise DataError(f"class {name!r} has {len(order)} images; at least 4 are needed to split it")
        test, rest = np.split(order, [round(len(order) * test_share)])
        parts["test"].append(test)
        if label >= num_base:
            parts["field"].append(rest)
        else:
            validation, train = np.split(rest, [max(round(len(rest) * validation_share), 1)])
            parts["validation"].append(validation)
            parts["train"].append(train)
    chosen = {name: rng.permutation(np.concatenate(indices or [np.zeros(0, int)])) for name, indices in parts.items()}
    return ImageSplits(
        **{name: LabeledImages(images=images[index], labels=labels[index]) for name, index in chosen.items()},
        label_names=label_names,
        num_base=num_base,
    )
