"""What a simulated board was taught: labels, a version that goes on, and the last lessons, which can be taken back.

No features are learned, so no guard refuses one; every other refusal is the agent's (`device/classifier.py`, `device/migration.py`).
"""

from dataclasses import dataclass
from typing import Self

from device.contract.errors import LearningError, UpdateRefusedError
from host.simulate.release import Release

MAX_LESSONS = 20
MAX_LABEL_CHARACTERS = 64
MAX_EXAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One lesson, under its command's id."""

    id: str
    label: str
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of the taught classes with another bundle, by label."""

    kept: tuple[str, ...] = ()
    migrated: tuple[str, ...] = ()
    shipped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """One version of what a board knows: the shipped labels, those of lessons too old to be taken back, and lessons."""

    release: Release
    backbone: str
    version: int = 0
    settled: tuple[str, ...] = ()
    lessons: tuple[Lesson, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The shipped ones, then the others in the order they were taught."""
        return tuple(dict.fromkeys((*self.release.labels, *self.settled, *(lesson.label for lesson in self.lessons))))

    @property
    def taught(self) -> tuple[str, ...]:
        """The labels of which this board had a lesson, shipped ones too."""
        own = {*self.settled, *(lesson.label for lesson in self.lessons)}
        return tuple(label for label in self.labels if label in own)

    def learn(self, lesson: Lesson) -> Self:
        """The head after one more lesson; LearningError where it cannot be learned."""
        label = lesson.label
        if not 0 < len(label) <= MAX_LABEL_CHARACTERS or not label.isprintable() or label != label.strip():
            raise LearningError(
                f"label {label!r}: use 1 to {MAX_LABEL_CHARACTERS} printable characters without outer blanks"
            )
        if label not in self.labels and len(self.labels) >= self.release.max_classes:
            raise LearningError(
                f"{label!r} would be class {len(self.labels) + 1}, this model may learn {self.release.max_classes}"
            )
        lessons = (*self.lessons, lesson)
        old = tuple(dict.fromkeys((*self.settled, *(kept.label for kept in lessons[:-MAX_LESSONS]))))
        return self._next(settled=old, lessons=lessons[-MAX_LESSONS:])

    def require_fit(self, features: tuple[tuple[float, ...], ...]) -> None:
        """Raise LearningError unless these are features [n, D] of this model."""
        widths = {len(row) for row in features}
        if len(widths) != 1:
            raise LearningError("features: rows have different lengths")
        width, dim = widths.pop(), self.release.feature_dim
        if width != dim or len(features) > MAX_EXAMPLES:
            raise LearningError(
                f"features must be 1 to {MAX_EXAMPLES} rows of {dim}, got shape {[len(features), width]}"
            )

    def undo(self, lesson: str) -> tuple[Self, Lesson]:
        """The head without a lesson (its id; "" for the last one), and that lesson; LearningError where there is none."""
        if not self.lessons:
            raise LearningError(
                "no lesson is here to be taken back; 'fieldvit-device learned list' shows what was learned"
            )
        taken = next((kept for kept in reversed(self.lessons) if kept.id == lesson or not lesson), None)
        if taken is None:
            known = ", ".join(repr(kept.id) for kept in self.lessons)
            raise LearningError(f"lesson {lesson!r} cannot be taken back; those that can are: {known}")
        rest = tuple(kept for kept in self.lessons if kept is not taken)
        return self._next(settled=self.settled, lessons=rest), taken

    def forecast(self, release: Release, precision: str) -> Fate:
        """What would become of the taught classes with this bundle, as far as its manifest tells."""
        backbone = release.backbone(precision)
        if not self.taught:
            return Fate()
        if backbone == self.backbone and release.head == self.release.head:
            return Fate(kept=self.taught)
        has_way = (self.backbone, backbone) in release.ways
        moving = [k for k in self.taught if has_way or (backbone == self.backbone and k not in release.labels)]
        rest = [label for label in self.taught if label not in moving]
        return Fate(
            migrated=tuple(moving),
            shipped=tuple(label for label in rest if label in release.labels),
            dropped=tuple(label for label in rest if label not in release.labels),
        )

    def moved(self, release: Release, precision: str) -> Self:
        """The head for another bundle, with what `forecast` lets move."""
        fate = self.forecast(release, precision)
        keeps = {*fate.kept, *fate.migrated}
        cls = type(self)
        return cls(
            release=release,
            backbone=release.backbone(precision),
            version=self.version if fate.kept else int(bool(keeps)),
            settled=tuple(label for label in self.settled if label in keeps),
            lessons=tuple(lesson for lesson in self.lessons if lesson.label in keeps or fate.kept),
        )

    def _next(self, *, settled: tuple[str, ...], lessons: tuple[Lesson, ...]) -> Self:
        cls = type(self)
        return cls(
            release=self.release,
            backbone=self.backbone,
            version=self.version + 1,
            settled=settled,
            lessons=lessons,
        )


def loss_refusal(release: Release, fate: Fate) -> UpdateRefusedError:
    """The refusal of a bundle that would not know classes taught here."""
    return UpdateRefusedError(
        "learned-loss",
        f"{release.name} {release.version} would drop {', '.join(map(repr, fate.dropped))}, taught on this board; "
        "publish it with export.migrate_from, or accept the loss with 'fieldvit-device update --accept-loss', "
        'the command\'s accept_loss, or update.on_learned_loss = "drop"',
    )
