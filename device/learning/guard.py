"""The guard: refuse a proposed head that would do harm, before it is committed.

It looks at the head's numbers, at held-out features of the classes that the bundle shipped with, at a few examples of each
class that was taught in the field, and at the examples that were just taught. It changes nothing; the caller commits or
throws the proposal away.

Both bounds hold over all lessons together, for what a head is compared with does not move: the shipped classes with the
bundle's own head, a taught class with its examples as they were answered after the lesson they came in. Comparing with the
head before instead would let every lesson cost the bound again.

Examples of a taught class are feature vectors, not images, and at most `KEPT_PER_CLASS` of each are kept. The head has
learned them, and with a few dozen examples in hundreds of dimensions it knows them by heart: they stay right while nine of
ten other images of their class go wrong. So they are asked in turns, each of a head without it: five-fold
cross-validation, exact, because SLDA's statistics are sums and can be taken out again. (That a class's mean is answered as
its own proves nothing: with equal priors it always is.) A class taught with a single example leaves nothing to keep.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from device.contract.errors import GuardError
from device.contract.record import record
from device.learning.slda import SLDA, UNTAUGHT_BIAS

MAX_WEIGHT = 1e6
"""Largest weight or bias: beyond it, float32 logits are coarser than the differences that decide."""

MIN_NEW_ACCURACY = 0.5
"""Least share of the examples of a new class that the proposed head must answer right."""


KEPT_PER_CLASS = 20
"""Examples kept of each class taught in the field, to guard it."""

MAX_TAUGHT_DROP = 0.15
"""Share of the kept examples of a class that all later lessons together may cost. Of 20: three, where one swings by chance;
on the bench's digits an honest lesson cost none or one, and ten mislabelled images cost five."""

FOLDS = 5


class Learner(Protocol):
    """What the guard needs of a learner."""

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight [D, K] and bias [K]."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Features float32 [M, D] and labels int64 [M] of classes taught in the field."""

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: "Examples") -> "Examples":
        return Examples(np.vstack([self.features, other.features]), np.concatenate([self.labels, other.labels]))

    def __getitem__(self, index: np.ndarray | slice) -> "Examples":
        return Examples(self.features[index], self.labels[index])

    @classmethod
    def none(cls, feature_dim: int) -> "Examples":
        return cls(np.zeros((0, feature_dim), np.float32), np.zeros(0, np.int64))


@record(frozen=True, slots=True, kw_only=True)
class GuardFigures:
    """What the guard measured; shares of right answers, 0..1. `old_before` is of the bundle's own head."""

    old_before: float
    old_after: float
    taught_before: float
    taught_after: float


def check(
    base: Learner,
    before: Learner,
    after: Learner,
    *,
    guard_features: np.ndarray,
    guard_labels: np.ndarray,
    new_features: np.ndarray,
    new_labels: np.ndarray,
    max_drop: float,
    names: Sequence[str] = (),
) -> GuardFigures:
    """Compare the proposed head with the bundle's and the served one.

    Args:
        base: the bundle's own head.
        before: the served head.
        after: the proposed head; its classes begin with those of `before`.
        guard_features: [G, D], held-out features of the old classes.
        guard_labels: [G].
        new_features: [B, D], the examples that `after` has just learned.
        new_labels: [B].
        max_drop: share of right answers on the guard features that all updates since the bundle's head may cost.
        names: of the classes, for what is raised; without them it has their numbers.

    Raises:
        GuardError: the head is not finite or not bounded, the old classes lose more than `max_drop`, or the taught
            examples are answered worse than before (a known class) or mostly wrong (a new class).
    """
    if len(guard_features) == 0:
        raise GuardError("there are no guard features to compare the heads on; export the bundle again")
    head_base, head_before, head_after = base.linear(), before.linear(), after.linear()
    _require_bounded(*head_after)
    figures = GuardFigures(
        old_before=_accuracy(head_base, guard_features, guard_labels),
        old_after=_accuracy(head_after, guard_features, guard_labels),
        taught_before=_accuracy(head_before, new_features, new_labels),
        taught_after=_accuracy(head_after, new_features, new_labels),
    )
    drop = figures.old_before - figures.old_after
    if drop > max_drop + 1e-9:
        raise GuardError(
            f"the old classes would fall from {figures.old_before:.4f} to {figures.old_after:.4f} right, "
            f"{drop:.4f} lost where {max_drop:.4f} is allowed; check the labels of the new examples"
        )
    _require_learned(head_before, head_after, new_features, new_labels, names)
    return figures


def check_taught(learner: SLDA, kept: Examples, taught: Examples, names: Sequence[str] = ()) -> Examples:
    """Check the classes taught in the field, and choose what to keep of the newest examples.

    Args:
        learner: the proposed one; it has learned `kept` and `taught`.
        kept: of earlier lessons.
        taught: of the lesson just learned, one class; empty for a class that the bundle shipped with.
        names: as `check` takes them.

    Returns:
        `kept`, and of `taught` those that a head answers right without having learned them, while there is room.

    Raises:
        GuardError: a class would lose more than `MAX_TAUGHT_DROP` of its kept examples (but one may always swing).
    """
    room = KEPT_PER_CLASS - int((kept.labels == taught.labels[0]).sum()) if len(taught) else 0
    everything = kept + taught[:room]
    is_right = _answered_unseen(learner, everything)
    for label in np.unique(kept.labels):
        own = is_right[: len(kept)][kept.labels == label]
        lost = len(own) - int(own.sum())
        allowed = max(1, math.floor(MAX_TAUGHT_DROP * len(own)))
        if lost > allowed:
            raise GuardError(
                f"class {_name(label, names)}, taught before, would lose {lost} of its {len(own)} kept examples where "
                f"{allowed} may be lost; check the labels of the new examples"
            )
    is_right[: len(kept)] = True
    return everything[is_right]


def _answered_unseen(learner: SLDA, examples: Examples) -> np.ndarray:
    """Which examples [M] are answered right by a head that has not learned them."""
    is_right = np.zeros(len(examples), bool)
    fold_of = np.zeros(len(examples), np.int64)
    for label in np.unique(examples.labels):
        own = np.flatnonzero(examples.labels == label)
        fold_of[own] = np.arange(len(own)) % FOLDS
    for fold in np.unique(fold_of):
        own = fold_of == fold
        unseen = examples[own]
        logits = learner.without(unseen.features, unseen.labels).logits(unseen.features)
        is_right[own] = logits.argmax(axis=1) == unseen.labels
    return is_right


def _require_bounded(weight: np.ndarray, bias: np.ndarray) -> None:
    taught = bias[bias != np.float32(UNTAUGHT_BIAS)]
    largest = float(np.max([np.abs(values).max(initial=0) for values in (weight, taught)]))  # NaN stays NaN
    if not largest <= MAX_WEIGHT:
        raise GuardError(
            f"the head's largest weight is {largest:.3g}, the bound is {MAX_WEIGHT:.3g}; check the features"
        )


def _require_learned(
    head_before: tuple[np.ndarray, np.ndarray],
    head_after: tuple[np.ndarray, np.ndarray],
    features: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
) -> None:
    _, bias_before = head_before
    for label in np.unique(labels):
        own = labels == label
        is_new = label >= len(bias_before) or bias_before[label] == np.float32(UNTAUGHT_BIAS)
        bound = MIN_NEW_ACCURACY if is_new else _accuracy(head_before, features[own], labels[own])
        accuracy = _accuracy(head_after, features[own], labels[own])
        if accuracy < bound:
            raise GuardError(
                f"class {_name(label, names)}: {accuracy:.4f} of its {own.sum()} examples would be answered right, "
                f"the bound is {bound:.4f}; check their labels"
            )


def _name(label: int, names: Sequence[str]) -> str:
    return repr(names[label]) if names else str(label)


def _accuracy(head: tuple[np.ndarray, np.ndarray], features: np.ndarray, labels: np.ndarray) -> float:
    weight, bias = head
    if len(features) == 0:
        return 1.0
    return float(((features @ weight + bias).argmax(axis=1) == labels).mean())
