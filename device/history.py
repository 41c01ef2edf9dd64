"""The last lessons, kept so that one can be taken back: its features and label, and the head that all of them were taught on.

Taking a lesson back is not subtracting it: sums of floating-point numbers do not come apart again. The head is taught
anew, from where the kept lessons begin, with all of them but that one. The same steps on the same numbers give the same
bits, so after `undo` the head is what it was before its lesson. Bounded by number and bytes: older lessons become part of
the start and cannot be taken back one by one any more.
"""

from dataclasses import dataclass

import numpy as np

MAX_LESSONS = 20
MAX_BYTES = 1 << 20
"""Of features; the newest lesson is kept however large it is."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One lesson: the id of its command, the label, and the features float32 [n, D]."""

    id: str
    label: str
    features: np.ndarray


def is_too_much(lessons: tuple[Lesson, ...]) -> bool:
    """Whether the oldest lesson should become part of the start."""
    size = sum(lesson.features.nbytes for lesson in lessons)
    return len(lessons) > MAX_LESSONS or (len(lessons) > 1 and size > MAX_BYTES)


def to_arrays(lessons: tuple[Lesson, ...]) -> dict[str, np.ndarray]:
    """Plain arrays for a file; nothing for no lessons."""
    if not lessons:
        return {}
    return {
        "ids": np.array([lesson.id for lesson in lessons]),
        "labels": np.array([lesson.label for lesson in lessons]),
        "counts": np.array([len(lesson.features) for lesson in lessons]),
        "features": np.vstack([lesson.features for lesson in lessons]),
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> tuple[Lesson, ...]:
    """What `to_arrays` gave.

    Raises:
        KeyError, ValueError: the arrays do not fit together.
    """
    if not arrays:
        return ()
    ids, labels, counts, features = (arrays[name] for name in ("ids", "labels", "counts", "features"))
    is_sound = ids.ndim == labels.ndim == counts.ndim == 1 and features.ndim == 2
    if not is_sound or features.dtype != np.float32 or counts.min() < 1 or counts.sum() != len(features):
        raise ValueError("the lessons do not fit together")
    parts = np.split(features, np.cumsum(counts)[:-1])
    return tuple(Lesson(str(i), str(k), part) for i, k, part in zip(ids, labels, parts, strict=True))
