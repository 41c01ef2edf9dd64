"""The head on the features: what the bundle ships, and what this board has learned on top.

`head.npz` holds, per precision, the learner's state as `PRECISION/KEY`, held-out features of the shipped classes for the
guard (`guard_features`, `guard_labels`), and the mean and deviation of the features over the training images
(`feature_mean`, `feature_std`) for the drift measure.

Learning is a transaction: update a copy, let the guard compare it with the bundle's head and with what is kept of earlier
lessons, commit to disk, then replace the served head in one assignment. The frame loop reads that one reference and never waits.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from device.contract.errors import ArtifactError, LearningError
from device.contract.manifest import Artifact, Manifest
from device.contract.record import record
from device.golden import arrays_under, read_arrays
from device.history import Lesson, is_too_much
from device.learned import HEAD_NAME, LESSONS_REMEMBERED, LearnedState, LearnedStore, Start
from device.learning import guard
from device.learning.guard import Examples
from device.learning.slda import SLDA

MAX_LABEL_CHARACTERS = 64
MAX_EXAMPLES = 1000
_BESIDE_STATE = ("guard_features", "guard_labels", "feature_mean", "feature_std")


@record(frozen=True, slots=True, kw_only=True)
class BaseHead:
    """What a bundle ships for one artifact."""

    learner: SLDA
    labels: tuple[str, ...]
    guard_features: np.ndarray  # [G, D]
    guard_labels: np.ndarray  # [G]
    feature_mean: np.ndarray  # [D]
    feature_std: np.ndarray  # [D]


@record(frozen=True, slots=True, kw_only=True)
class Head:
    """One immutable version of the classifier."""

    learner: SLDA
    labels: tuple[str, ...]
    version: int
    weight: np.ndarray  # [D, K]
    bias: np.ndarray  # [K]
    kept: Examples
    lessons: tuple[str, ...] = ()
    history: tuple[Lesson, ...] = ()
    start: "Head | None" = None
    """What the lessons of `history` were taught on; None without any."""

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        return self.weight, self.bias

    def state(self, base: "Head") -> LearnedState:
        """What is stored of it; `base` is the bundle's own head, of which nothing is stored."""
        start = None
        if self.history and self.start is not None and self.start is not base:
            start = Start(labels=self.start.labels, arrays=self.start.learner.state(), kept=self.start.kept)
        return LearnedState(
            labels=self.labels,
            version=self.version,
            arrays=self.learner.state(),
            kept=self.kept,
            lessons=self.lessons,
            history=self.history,
            start=start,
        )


@record(frozen=True, slots=True, kw_only=True)
class Answer:
    """The classification of one frame; `scores` [K] add up to 1."""

    index: int
    label: str
    confidence: float
    scores: np.ndarray


class Classifier:
    """Classifies features, and learns new classes of them."""

    def __init__(self, base: BaseHead, manifest: Manifest, store: LearnedStore) -> None:
        self.base = base
        self._spec = manifest.learning
        self._store = store
        self._learning = threading.Lock()
        nothing = Examples.none(self._spec.feature_dim)
        self.base_head = make_head(base.learner, base.labels, version=0, kept=nothing)
        self.head = self._restored() or self.base_head

    @property
    def problems(self) -> list[str]:
        """Why learned state on the disk was not used."""
        return self._store.problems

    @property
    def taught(self) -> tuple[str, ...]:
        """The labels of which this board has examples of its own, shipped ones too."""
        head, shipped = self.head, self.base.learner.counts
        own = head.learner.counts.copy()
        own[: len(shipped)] -= shipped
        return tuple(label for label, count in zip(head.labels, own, strict=True) if count > 0)

    @property
    def max_drop(self) -> float:
        """Share of right answers that all lessons together may cost the shipped classes."""
        return self._spec.max_drop

    @property
    def max_classes(self) -> int:
        return self._spec.max_classes

    @contextmanager
    def hold(self) -> Iterator[Head]:
        """The head, which nobody can teach until the end of the block."""
        with self._learning:
            yield self.head

    def reload(self, *, is_new: bool) -> None:
        """Take the state from the disk again, which may have changed since this was made.

        Args:
            is_new: the model before has other features or another head; what is staged for this one never served.
        """
        if is_new:
            self._store.unstage()
        self.head = self._restored() or self.base_head

    def take_over(self, other: "Classifier") -> None:
        """Know what another one of the same backbone and shipped head has learned, also since this was made."""
        head = other.head
        if head is other.base_head:
            self.head = self.base_head
        else:
            self.head = replace(head, start=self.base_head if head.start is other.base_head else head.start)

    def stage(self, head: Head) -> None:
        """Take over a head from the model before, and write it; it counts when this model serves.

        Raises:
            LearningError: the disk does not take it.
        """
        head = replace(head, version=max(head.version, self.head.version + 1))
        self._store.stage(head.state(self.base_head))
        self.head = head

    def stage_nothing(self) -> None:
        """Know the shipped classes alone, whatever this backbone was taught when it served before: since then it may
        have been taken back on the model that serves now, which is the one to be asked.

        Raises:
            LearningError: the disk does not take it.
        """
        if self.head is not self.base_head:
            self.stage(self.base_head)

    def restore(self, head: Head, *, before: Head, is_served: Callable[[], bool]) -> Head:
        """Commit a head from elsewhere in place of what was learned here, with a version of its own; returns it.

        Raises:
            LearningError: the head is not `before` any more, the disk is full, or the model was replaced.
        """
        with self._learning:
            if self.head is not before:
                raise LearningError("something was taught in between; nothing was restored, look at it and try again")
            new = replace(head, version=max(head.version, before.version + 1))
            self._commit(new, is_served)
            return new

    def restored(self, state: LearnedState) -> Head:
        """The head of a stored state.

        Raises:
            LearningError, ValueError, KeyError: it is not of this bundle's classes and features, or is no state.
        """
        if state.labels[: len(self.base.labels)] != self.base.labels:
            raise LearningError("its labels are not this bundle's")
        if len(set(state.labels)) != len(state.labels):
            raise LearningError("two of its labels are the same")
        kept = state.kept or Examples.none(self._spec.feature_dim)
        head, start = self._restored_head(state.labels, state.arrays, kept), self.base_head
        if state.start is not None:
            start = self._restored_head(state.start.labels, state.start.arrays, state.start.kept)
        return replace(
            head,
            version=state.version,
            lessons=state.lessons,
            history=state.history,
            start=start if state.history else None,
        )

    def classify(self, features: np.ndarray) -> Answer:
        """Classify one frame's features [D]."""
        head = self.head
        logits = features @ head.weight + head.bias  # [K]
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        index = int(scores.argmax())
        return Answer(index=index, label=head.labels[index], confidence=float(scores[index]), scores=scores)

    def learn(
        self, features: np.ndarray, label: str, *, lesson: str = "", is_served: Callable[[], bool] = lambda: True
    ) -> Head:
        """Learn examples [n, D] of one class, known or new, and commit.

        Args:
            features: of the examples.
            label: of all of them.
            lesson: the command's id; one that was learned already changes nothing.
            is_served: whether this model is still the one that answers, asked before the commit.

        Raises:
            LearningError: unusable label or features, no room for another class, a full disk, or the model was replaced.
            GuardError: other classes would suffer; nothing changed.
        """
        _require_label(label)
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, and is refused
            features = features.astype(np.float32)
        _require_features(features, self._spec.feature_dim)
        with self._learning:
            old = self.head
            if lesson and lesson in old.lessons:
                return old
            taught = self.propose(old, label, features)
            start, history = self._shorten(old.start or old, (*old.history, Lesson(lesson, label, features)))
            new = replace(
                taught, version=old.version + 1, lessons=_with(old.lessons, lesson), start=start, history=history
            )
            self._commit(new, is_served)
            return new

    def undo(
        self, lesson: str = "", *, command: str = "", is_served: Callable[[], bool] = lambda: True
    ) -> tuple[Head, Lesson]:
        """Take a lesson back, and commit: labels, statistics and kept examples are as if it had never been.

        The version goes on: a number names one state only.

        Args:
            lesson: its id; empty for the last one.
            command: the id of the command that asks for it.
            is_served: as for `learn`.

        Returns:
            The new head, and the lesson.

        Raises:
            LearningError: there is no such lesson (any more), a later one would not have been learned without it, the disk
                is full, or the model was replaced.
        """
        with self._learning:
            old = self.head
            taken = _find(old.history, lesson)
            rest = tuple(other for other in old.history if other is not taken)
            head = start = old.start or old
            for other in rest:
                try:
                    head = self.propose(head, other.label, other.features)
                except LearningError as error:
                    raise LearningError(
                        f"lesson {taken.id!r} stays: lesson {other.id!r} builds on it ({error}); take that back first"
                    ) from error
            new = replace(head, version=old.version + 1, lessons=_with(old.lessons, command), start=start, history=rest)
            self._commit(new, is_served)
            return new, taken

    def propose(self, old: Head, label: str, features: np.ndarray) -> Head:
        """What `old` becomes by one lesson, past the guard; nothing is committed."""
        learner, labels = copy.deepcopy(old.learner), old.labels
        if label not in labels:
            if len(labels) >= self._spec.max_classes:
                raise LearningError(
                    f"{label!r} would be class {len(labels) + 1}, this model may learn {self._spec.max_classes}"
                )
            learner.add_class()
            labels = (*labels, label)
        targets = np.full(len(features), labels.index(label))
        learner.update(features, targets)
        new = make_head(learner, labels, version=old.version, kept=old.kept)
        guard.check(
            self.base_head,
            old,
            new,
            guard_features=self.base.guard_features,
            guard_labels=self.base.guard_labels,
            new_features=features,
            new_labels=targets,
            max_drop=self._spec.max_drop,
            names=labels,
        )
        is_shipped = label in self.base.labels
        own = Examples(features, targets)[: 0 if is_shipped else None]
        kept = guard.check_taught(learner, old.kept, own, labels)
        return replace(new, kept=kept)

    def _shorten(self, start: Head, history: tuple[Lesson, ...]) -> tuple[Head, tuple[Lesson, ...]]:
        """Move the oldest lessons into the start until the rest is within its bounds."""
        while is_too_much(history):
            oldest, *rest = history
            start, history = self.propose(start, oldest.label, oldest.features), tuple(rest)
        return start, history

    def _commit(self, new: Head, is_served: Callable[[], bool]) -> None:
        if not is_served():
            raise LearningError("the model was replaced while it learned; nothing was learned, name newer frames")
        self._store.save(new.state(self.base_head))
        self.head = new

    def has_learned(self, lesson: str) -> bool:
        """Whether the command of this id is among the last lessons."""
        return lesson in self.head.lessons

    def _restored(self) -> Head | None:
        state = self._store.load()
        if state is None:
            return None
        try:
            return self.restored(state)
        except (ValueError, KeyError) as error:
            self._store.problems.append(f"learned state not used: {self._store.path}: {error}")
            return None

    def _restored_head(self, labels: tuple[str, ...], arrays: dict[str, np.ndarray], kept: Examples) -> Head:
        learner = copy.deepcopy(self.base.learner)
        learner.restore(arrays)
        _require_kept(kept, learner, first=len(self.base.labels))
        return make_head(learner, labels, version=0, kept=kept)


def read_base_head(slot: Path, manifest: Manifest, artifact: Artifact) -> BaseHead:
    """Read the head that a bundle ships for one artifact; ArtifactError when it does not fit the manifest."""
    arrays = arrays_under(read_arrays(slot / HEAD_NAME), artifact.precision)
    missing = [name for name in _BESIDE_STATE if name not in arrays]
    if missing:
        raise ArtifactError(f"{slot / HEAD_NAME}: has no {artifact.precision}/{missing[0]}; export the bundle again")
    odd = [name for name, array in arrays.items() if array.dtype.kind not in "fiu"]
    if odd:
        raise ArtifactError(
            f"{slot / HEAD_NAME}: {artifact.precision}/{odd[0]} holds no real numbers; export the bundle again"
        )
    beside = {name: arrays.pop(name) for name in _BESIDE_STATE}
    try:
        learner = SLDA(len(manifest.labels), manifest.learning.feature_dim, shrinkage=manifest.learning.shrinkage)
        learner.restore(arrays)
    except (ValueError, KeyError) as error:
        raise ArtifactError(
            f"{slot / HEAD_NAME}: no usable {manifest.learning.method} state ({error}); export the bundle again"
        ) from error
    base = BaseHead(learner=learner, labels=manifest.labels, **beside)
    _require_base(base, manifest.learning.feature_dim, f"{slot / HEAD_NAME}: {artifact.precision}")
    return base


def _require_base(base: BaseHead, feature_dim: int, where: str) -> None:
    """What the frame loop and the guard will compute with must be of the shapes and kinds they take for granted."""
    count, labels = len(base.labels), base.guard_labels
    shapes = {
        "feature_mean": base.feature_mean.shape == base.feature_std.shape == (feature_dim,),
        "guard_features": base.guard_features.shape == (len(labels) if labels.ndim == 1 else -1, feature_dim),
        "guard_labels": labels.dtype.kind in "iu" and bool(((labels >= 0) & (labels < count)).all()),
        "counts": len(base.learner.counts) == count,
    }
    arrays = (base.feature_mean, base.feature_std, base.guard_features)
    shapes["values"] = all(array.dtype.kind == "f" and bool(np.isfinite(array).all()) for array in arrays)
    if wrong := [name for name, is_right in shapes.items() if not is_right]:
        raise ArtifactError(
            f"{where}/{wrong[0]} does not fit {count} labels and {feature_dim} features; export the bundle again"
        )


def _with(ids: tuple[str, ...], new: str) -> tuple[str, ...]:
    return (*ids, new)[-LESSONS_REMEMBERED:] if new else ids


def _find(history: tuple[Lesson, ...], lesson: str) -> Lesson:
    """The lesson of that id, or the last one."""
    for kept in reversed(history):
        if kept.id == lesson or not lesson:
            return kept
    if not history:
        raise LearningError("no lesson is here to be taken back; 'fieldvit-device learned list' shows what was learned")
    known = ", ".join(repr(kept.id) for kept in history)
    raise LearningError(f"lesson {lesson!r} cannot be taken back; those that can are: {known}")


def make_head(learner: SLDA, labels: Sequence[str], *, version: int, kept: Examples) -> Head:
    weight, bias = learner.linear()
    if weight.shape[1] != len(labels) or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise LearningError(f"the head has {weight.shape[1]} classes for {len(labels)} labels, or is not finite")
    return Head(
        learner=learner,
        labels=tuple(labels),
        version=version,
        weight=weight,
        bias=bias,
        kept=kept,
    )


def _require_kept(kept: Examples, learner: SLDA, *, first: int) -> None:
    """The examples of a restored state are of classes taught in the field, and among what the learner has seen."""
    is_list = kept.labels.ndim == 1 and np.issubdtype(kept.labels.dtype, np.integer)
    if not is_list or kept.features.shape != (len(kept.labels), learner.feature_dim):
        raise LearningError(f"kept examples have shapes {kept.features.shape} and {kept.labels.shape}")
    if len(kept) and not first <= kept.labels.min() <= kept.labels.max() < learner.num_classes:
        raise LearningError("kept examples are of classes that were not taught here")
    if (np.bincount(kept.labels, minlength=learner.num_classes) > learner.counts).any():
        raise LearningError("more examples are kept than were learned")
    if not np.isfinite(kept.features).all():
        raise LearningError("kept examples must be finite numbers")


def _require_label(label: str) -> None:
    if not 0 < len(label) <= MAX_LABEL_CHARACTERS or not label.isprintable() or label != label.strip():
        raise LearningError(
            f"label {label!r}: use 1 to {MAX_LABEL_CHARACTERS} printable characters without outer blanks"
        )


def _require_features(features: np.ndarray, feature_dim: int) -> None:
    if features.ndim != 2 or features.shape[1] != feature_dim or not 0 < len(features) <= MAX_EXAMPLES:
        raise LearningError(
            f"features must be 1 to {MAX_EXAMPLES} rows of {feature_dim}, got shape {list(features.shape)}"
        )
    if not np.isfinite(features).all():
        raise LearningError("features must be finite numbers")
