"""What becomes of the classes taught here when another model takes over, and moving them to its features.

    kept      the new model has the same backbone and head: its state is the same file
    migrated  the same backbone with another head, or the bundle has a projector from the old backbone
    shipped   not moved, but the new bundle knows the class itself
    dropped   the new model would not know the class: the update is refused, unless the operator accepts that

Only what was taught here moves: the old bundle's own statistics are taken out, for the new one ships better ones. Older
lessons, of which only sums are left, move as sums, and exactly; the last ones move as features, and are learned again one by
one, each past the guard, so that they can still be taken back; where it lets them pass only together, they move as sums too.
What a map cannot explain is missing in mapped features, which makes classes look tidier than they will be. So its covariance
is added for each of their samples (on digits that lowered what one class cost the shipped ones from 2.8 to 2.1 % of the guard's
features), and the new head is judged, by the same guard, on features to which that rest was added. A class that fails is
left behind; the others move without it.

What the new model's backbone was taught itself, when it served before, does not count: it may have been taken back since.

A class that a head for the same backbone ships is not moved on top of it: such a head may have been merged from the boards'
own statistics, which would count twice.
"""

import copy
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from device.classifier import Classifier, Head, make_head
from device.contract.errors import ArtifactError, GuardError, LearningError, UpdateRefusedError
from device.contract.manifest import Artifact, Manifest
from device.contract.record import record
from device.golden import read_arrays
from device.history import Lesson
from device.learned import HEAD_NAME
from device.learning import guard
from device.learning.guard import Examples, GuardFigures
from device.learning.projector import Projector

DRAWS = 10
"""Draws of the projector's rest for each example that a moved head is judged by."""

Labels = tuple[str, ...]


@record(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of the taught classes, by label."""

    kept: Labels = ()
    migrated: Labels = ()
    shipped: Labels = ()
    dropped: Labels = ()

    @property
    def words(self) -> str:
        """For messages."""
        parts = {"keep": self.kept, "migrate": self.migrated, "find shipped": self.shipped, "drop": self.dropped}
        return "; ".join(f"{verb} {', '.join(map(repr, labels))}" for verb, labels in parts.items() if labels)


@record(frozen=True, slots=True, kw_only=True)
class Migration:
    """A head for the new model, not written yet, and what the guard said of it; None where nothing moves."""

    fate: Fate
    head: Head | None = None
    figures: GuardFigures | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a class does not move although there is a way."""


class Taught(Protocol):
    """What of a loaded model matters here."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def artifact(self) -> Artifact: ...

    @property
    def classifier(self) -> Classifier: ...


class _UnfitError(LearningError):
    """These classes cannot move; others may without them."""

    def __init__(self, labels: Collection[str], reason: str) -> None:
        super().__init__(reason)
        self.labels = labels


def forecast(old: Taught | None, manifest: Manifest, artifact: Artifact) -> Fate:
    """What would become of the taught classes, as far as the manifest tells; the guard has the last word."""
    taught = old.classifier.taught if old else ()
    if old is None or not taught:
        return Fate()
    if is_same_state(old, manifest, artifact):
        return Fate(kept=taught)
    has_way = bool(manifest.projector(old.artifact.backbone, artifact.backbone))
    is_same_backbone = old.artifact.backbone == artifact.backbone
    moving = tuple(k for k in taught if has_way or (is_same_backbone and k not in manifest.labels))
    return _fate(taught, moving, manifest.labels)


def migrate(old: Taught | None, new: Taught, directory: Path) -> Migration:
    """Move what was taught to the new model; nothing is written.

    Args:
        old: the served model, whose classifier the caller holds; None: there is none.
        new: the one that is to serve.
        directory: of its bundle.
    """
    fate = forecast(old, new.manifest, new.artifact)
    if old is None or not fate.migrated:
        return Migration(fate=fate)
    try:
        projector = _projector(old, new, directory)
    except ArtifactError as error:
        return Migration(
            fate=_fate(old.classifier.taught, (), new.manifest.labels), reasons=dict.fromkeys(fate.migrated, str(error))
        )
    moving = set(fate.migrated)
    reasons: dict[str, str] = {}
    while moving:
        try:
            head, figures = _move_somehow(old.classifier, new.classifier, projector, moving)
        except ValueError as error:  # also NumPy's, about numbers that nobody should have signed
            unfit = moving.intersection(error.labels if isinstance(error, _UnfitError) else ()) or moving
            reasons |= dict.fromkeys(unfit, str(error))
            moving = moving - unfit
        else:
            fate = _fate(old.classifier.taught, moving, new.manifest.labels)
            return Migration(fate=fate, head=head, figures=figures, reasons=reasons)
    return Migration(fate=_fate(old.classifier.taught, (), new.manifest.labels), reasons=reasons)


def loss_refusal(manifest: Manifest, fate: Fate, reasons: Mapping[str, str] | None = None) -> UpdateRefusedError:
    """The refusal of a model that would not know classes taught here: which, why, and what to do."""
    why = "; ".join((reasons or {}).get(label, "") for label in fate.dropped if (reasons or {}).get(label))
    return UpdateRefusedError(
        "learned-loss",
        f"{manifest.name} {manifest.version} would drop {', '.join(map(repr, fate.dropped))}, taught on this board"
        f"{f' ({why})' if why else ''}; publish it with export.migrate_from, or accept the loss with "
        "'fieldvit-device update --accept-loss', the command's accept_loss, or update.on_learned_loss = \"drop\"",
    )


def hold(old: Taught | None) -> AbstractContextManager[object]:
    """Nobody teaches the old model from here until the new one serves: such a lesson would be lost."""
    return old.classifier.hold() if old else nullcontext()


def _move_somehow(
    old: Classifier, new: Classifier, projector: Projector, labels: Collection[str]
) -> tuple[Head, GuardFigures]:
    """Move lessons one by one, or, where the guard lets one pass only together with others, all of them as sums."""
    try:
        return move(old, new, projector, labels, keeps_lessons=True)
    except ValueError:
        return move(old, new, projector, labels, keeps_lessons=False)


def move(
    old: Classifier, new: Classifier, projector: Projector, labels: Collection[str], *, keeps_lessons: bool
) -> tuple[Head, GuardFigures]:
    """The head that `new` would have if the lessons of these labels had been taught to it.

    Args:
        old: the classifier that was taught.
        new: of the model that takes over.
        projector: from the one's features to the other's.
        labels: of the classes to move.
        keeps_lessons: the last lessons can still be taken back one by one; else only their sums move.

    Raises:
        LearningError: some classes cannot move; the error names them.
    """
    source = old.head if keeps_lessons else replace(old.head, history=(), start=None)
    history = tuple(lesson for lesson in source.history if lesson.label in labels)
    moved = tuple(Lesson(lesson.id, lesson.label, projector.features(lesson.features)) for lesson in history)
    examples = sum(len(lesson.features) for lesson in moved)
    head = start = _moved_start(source.start or source, old, new, projector, labels, rest=examples * projector.residual)
    for lesson in moved:
        try:
            head = new.propose(head, lesson.label, lesson.features)
        except LearningError as error:
            raise _UnfitError([lesson.label], f"{lesson.label!r}: lesson {lesson.id!r}: {error}") from error
    figures = _judge(source.start or source, new, projector, head, history)
    return replace(
        head,
        version=old.head.version + 1,
        lessons=old.head.lessons,
        start=start if moved else None,
        history=moved,
    ), figures


def _moved_start(
    start: Head, old: Classifier, new: Classifier, projector: Projector, labels: Collection[str], *, rest: np.ndarray
) -> Head:
    """What the kept lessons are taught on: the new bundle's head, the sums of the lessons before them, and their `rest`."""
    own = _own_statistics(start, old, labels)
    chosen = np.flatnonzero(own["counts"])
    if not len(chosen) and not rest.any():
        return new.base_head
    learner, names = copy.deepcopy(new.base.learner), list(new.base.labels)
    moved = projector.statistics(own)
    index_of: dict[int, int] = {}
    for index in chosen:
        label = start.labels[index]
        if label not in names:
            names.append(label)
            learner.add_class()
        to = index_of[int(index)] = names.index(label)
        learner.counts[to] += moved["counts"][index]
        learner.sums[to] += moved["sums"][index]
    learner.gram += moved["gram"] + rest
    if len(names) > new.max_classes:
        added = [start.labels[index] for index in chosen if start.labels[index] not in new.base.labels]
        raise _UnfitError(
            added[-1:], f"{added[-1]!r} would be class {len(names)}, the new model may learn {new.max_classes}"
        )
    own_labels = [start.labels[index] for index in chosen]
    try:
        head = make_head(learner, names, version=0, kept=_moved_kept(start, new, projector, index_of))
        guard.check_taught(learner, head.kept, Examples.none(learner.feature_dim))
    except LearningError as error:
        raise _UnfitError(own_labels, f"{', '.join(map(repr, own_labels))}: {error}") from error
    return head


def _own_statistics(start: Head, old: Classifier, labels: Collection[str]) -> dict[str, np.ndarray]:
    """What was added to the old bundle's head, of these labels alone: counts [K], sums [K, D], gram [D, D].

    Sums of other labels are left out; of their share in the Gram matrix, the part of their means is known, and their
    scatter is taken to be that of all classes.
    """
    base, learner = old.base.learner, start.learner
    counts, sums, gram = learner.counts.copy(), learner.sums.copy(), learner.gram - base.gram
    counts[: base.num_classes] -= base.counts
    sums[: base.num_classes] -= base.sums
    for index in np.flatnonzero(counts):
        if start.labels[index] not in labels:
            gram -= np.outer(sums[index], sums[index]) / counts[index] + counts[index] * learner.covariance()
            counts[index], sums[index] = 0, 0
    return {"counts": counts, "sums": sums, "gram": gram}


def _moved_kept(start: Head, new: Classifier, projector: Projector, index_of: dict[int, int]) -> Examples:
    """The guard's examples of classes that the new bundle does not ship."""
    first = len(new.base.labels)
    is_own = np.array([index_of.get(int(label), -1) >= first for label in start.kept.labels], bool)
    kept = start.kept[is_own]
    labels = np.array([index_of[int(label)] for label in kept.labels], np.int64)
    return Examples(projector.features(kept.features), labels)


def _judge(start: Head, new: Classifier, projector: Projector, head: Head, history: tuple[Lesson, ...]) -> GuardFigures:
    """Let the guard judge a moved head as it will be asked: by features with what the map does not explain."""
    names = [start.labels[label] for label in start.kept.labels] + [k.label for k in history for _ in k.features]
    features = np.vstack([start.kept.features, *(lesson.features for lesson in history)])
    is_own = np.array([name in head.labels and name not in new.base.labels for name in names], bool)
    targets = np.array([head.labels.index(name) for name, own in zip(names, is_own, strict=True) if own], np.int64)
    asked = projector.with_rest(features[is_own], times=DRAWS, rng=np.random.default_rng(0))
    answers = (asked @ head.weight + head.bias).argmax(axis=1).reshape(DRAWS, -1)  # [draws, n]
    for label in np.unique(targets):
        share = float((answers[:, targets == label] == label).mean())
        if share < guard.MIN_NEW_ACCURACY:
            name = head.labels[label]
            raise _UnfitError(
                [name],
                f"{name!r}: {share:.4f} of its examples would be answered right on the new features, "
                f"the bound is {guard.MIN_NEW_ACCURACY:.4f}; teach it again there",
            )
    try:
        return guard.check(
            new.base_head,
            new.base_head,
            head,
            guard_features=new.base.guard_features,
            guard_labels=new.base.guard_labels,
            new_features=asked,
            new_labels=np.tile(targets, DRAWS),
            max_drop=new.max_drop,
        )
    except GuardError as error:
        raise _UnfitError(_harmful(new, head), str(error)) from error


def _harmful(new: Classifier, head: Head) -> list[str]:
    """The taught class that most of the shipped classes' features go to; none: all of them are to blame."""
    answers = (new.base.guard_features @ head.weight + head.bias).argmax(axis=1)
    counts = np.bincount(answers, minlength=len(head.labels))[len(new.base.labels) :]
    return [head.labels[len(new.base.labels) + int(counts.argmax())]] if counts.any() else []


def is_same_state(old: Taught, manifest: Manifest, artifact: Artifact) -> bool:
    """Whether a model has the backbone and the head, and so the learned state, of the one that serves."""
    heads = {m.files.get(HEAD_NAME) for m in (old.manifest, manifest)}
    return old.artifact.backbone == artifact.backbone and len(heads) == 1


def _fate(taught: Labels, moving: Collection[str], shipped: Labels) -> Fate:
    left = [label for label in taught if label not in moving]
    return Fate(
        migrated=tuple(label for label in taught if label in moving),
        shipped=tuple(label for label in left if label in shipped),
        dropped=tuple(label for label in left if label not in shipped),
    )


def _projector(old: Taught, new: Taught, directory: Path) -> Projector:
    if old.artifact.backbone == new.artifact.backbone:
        return Projector.identity(new.manifest.learning.feature_dim)
    entry = new.manifest.projector(old.artifact.backbone, new.artifact.backbone)
    if entry is None:
        raise ArtifactError(f"{directory}: has no projector from backbone {old.artifact.backbone[:12]}...")
    return read_projector(
        directory / entry.path,
        from_backbone=old.artifact.backbone,
        to_backbone=new.artifact.backbone,
        dims=(old.manifest.learning.feature_dim, new.manifest.learning.feature_dim),
    )


def read_projector(path: Path, *, from_backbone: str, to_backbone: str, dims: tuple[int, int]) -> Projector:
    """A projector of a bundle, which must be the one between these two backbones of `dims` features.

    The file is an .npz: `backbones` [2], the SHA-256 of the old and of the new one, and the arrays of `Projector`.

    Raises:
        ArtifactError: damaged, of other backbones, or of other shapes.
    """
    arrays = read_arrays(path)
    try:
        found = tuple(str(backbone) for backbone in arrays["backbones"])
        weight, bias, residual = (arrays[name].astype(np.float64) for name in ("weight", "bias", "residual"))
        projector = Projector(weight, bias, residual)
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: is no projector ({error}); export the bundle again") from error
    if found != (from_backbone, to_backbone) or projector.weight.shape != dims:
        raise ArtifactError(
            f"{path}: leads from backbone {' to '.join(name[:12] for name in found)}, {projector.weight.shape}; "
            f"needed is {from_backbone[:12]} to {to_backbone[:12]}, {dims}; export the bundle again"
        )
    return projector
