"""Class-incremental streams: a data set cut into experiences, each with classes that no other has.

Source: van de Ven and Tolias 2019, arXiv:1904.07734 (the class-incremental scenario); "10 experiences of 10 classes in
label order" is `class_incremental(labels, num_experiences=10)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from host.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """What arrives at once: `classes` in their order, and the `indices` int64 [n] of their images, ascending."""

    classes: tuple[int, ...]
    indices: np.ndarray


def class_incremental(
    labels: np.ndarray,
    *,
    num_experiences: int | None = None,
    classes_per_experience: int | None = None,
    order: Sequence[int] | None = None,
) -> list[Experience]:
    """Cut a data set into experiences by class.

    Args:
        labels: int64 [N].
        num_experiences: as even as possible, earlier ones larger; or
        classes_per_experience: the last one may be smaller.
        order: the classes in the order in which they arrive; None: ascending.

    Raises:
        DataError: neither or both sizes are given, one does not fit, or `order` is not an order of the classes.
    """
    classes = np.unique(labels)
    arriving = classes if order is None else np.asarray(order, np.int64)
    if not np.array_equal(np.sort(arriving), classes):
        raise DataError(f"order must name each of the {len(classes)} classes of the data once, got {list(arriving)}")
    if (num_experiences is None) == (classes_per_experience is None):
        raise DataError("a stream needs num_experiences or classes_per_experience, and not both")
    size = num_experiences if classes_per_experience is None else classes_per_experience
    if not 1 <= size <= len(classes):
        raise DataError(f"a stream of {len(classes)} classes cannot have {size} experiences or classes in each")
    if classes_per_experience is None:
        groups = np.array_split(arriving, size)
    else:
        groups = np.split(arriving, range(size, len(arriving), size))
    return [
        Experience(classes=tuple(group.tolist()), indices=np.flatnonzero(np.isin(labels, group))) for group in groups
    ]
