"""The guard: refuse a proposed head that would do harm, before it is committed.

It looks at the head's numbers, at held-out features of the classes that the bundle shipped with, and at the examples
that were just taught. It changes nothing; the caller commits or throws the proposal away.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from device.contract.errors import GuardError
from device.learning.slda import UNTAUGHT_BIAS

MAX_WEIGHT = 1e6
"""Largest weight or bias: beyond it, float32 logits are coarser than the differences that decide."""

MIN_NEW_ACCURACY = 0.5
"""Least share of the examples of a new class that the proposed head must answer right."""


class Learner(Protocol):
    """What the guard needs of a learner."""

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight [D, K] and bias [K]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardFigures:
    """What the guard measured; shares of right answers, 0..1."""

    old_before: float
    old_after: float
    taught_before: float
    taught_after: float


def check(
    before: Learner,
    after: Learner,
    *,
    guard_features: np.ndarray,
    guard_labels: np.ndarray,
    new_features: np.ndarray,
    new_labels: np.ndarray,
    max_drop: float,
) -> GuardFigures:
    """Compare the proposed head with the served one.

    Args:
        before: the served head.
        after: the proposed head; its classes begin with those of `before`.
        guard_features: [G, D], held-out features of the old classes.
        guard_labels: [G].
        new_features: [B, D], the examples that `after` has just learned.
        new_labels: [B].
        max_drop: share of right answers on the guard features that the update may cost.

    Raises:
        GuardError: the head is not finite or not bounded, the old classes lose more than `max_drop`, or the taught
            examples are answered worse than before (a known class) or mostly wrong (a new class).
    """
    if len(guard_features) == 0:
        raise GuardError("there are no guard features to compare the heads on; export the bundle again")
    head_before, head_after = before.linear(), after.linear()
    _require_bounded(*head_after)
    figures = GuardFigures(
        old_before=_accuracy(head_before, guard_features, guard_labels),
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
    _require_learned(head_before, head_after, new_features, new_labels)
    return figures


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
) -> None:
    _, bias_before = head_before
    for label in np.unique(labels):
        own = labels == label
        is_new = label >= len(bias_before) or bias_before[label] == np.float32(UNTAUGHT_BIAS)
        bound = MIN_NEW_ACCURACY if is_new else _accuracy(head_before, features[own], labels[own])
        accuracy = _accuracy(head_after, features[own], labels[own])
        if accuracy < bound:
            raise GuardError(
                f"class {label}: {accuracy:.4f} of its {own.sum()} examples would be answered right, "
                f"the bound is {bound:.4f}; check their labels"
            )


def _accuracy(head: tuple[np.ndarray, np.ndarray], features: np.ndarray, labels: np.ndarray) -> float:
    weight, bias = head
    if len(features) == 0:
        return 1.0
    return float(((features @ weight + bias).argmax(axis=1) == labels).mean())
