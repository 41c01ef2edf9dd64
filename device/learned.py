"""What a board has learned, on its disk: `ROOT/state/BACKBONE.HEAD.npz`, and the version before as `.prev`.

A file is named by the backbone whose features it was learned on (its SHA-256) and by the head that the bundle shipped with
(the first half of its): after another backbone, or another head from the host, it is not loaded, and it is there when the
board goes back. What a new model takes over of it (`migration.py`) is written as `.staged` before the new model may serve,
and counts from then on. A damaged file is never repaired: the version before is used, or the bundle's own head; and it
never takes the place of a version before that is sound.

Kept are the learner's statistics, the last lessons and the state they began at (`history.py`), up to
`guard.KEPT_PER_CLASS` feature vectors of each class taught here (not images), by which the guard knows the class again,
and the ids of the last lessons, so that a command that comes twice is learned once.
"""

import io
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from device.contract.bundle import read_manifest
from device.contract.errors import ArtifactError, LearningError
from device.contract.files import sync_directory, write_atomic
from device.contract.record import record
from device.golden import arrays_under, read_arrays
from device.history import Lesson, from_arrays, to_arrays
from device.learning.guard import Examples

HEAD_NAME = "head.npz"
LESSONS_REMEMBERED = 100
HEAD_DIGITS = 32

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Start:
    """What the kept lessons were taught on: all labels, the learner's arrays, and the guard's examples."""

    labels: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    kept: Examples


@record(frozen=True, slots=True, kw_only=True)
class LearnedState:
    """One committed version: all labels, the shipped ones first, the learner's arrays, and the guard's examples.

    `lessons` are the ids of the last commands that made it, `history` the lessons that can be taken back, and `start` what
    these were taught on; None for the bundle's own head.
    """

    labels: tuple[str, ...]
    version: int
    arrays: dict[str, np.ndarray]
    kept: Examples | None = None
    lessons: tuple[str, ...] = ()
    history: tuple[Lesson, ...] = ()
    start: Start | None = None


@dataclass(slots=True)
class LearnedStore:
    """The learned state of one backbone and head. `problems` tells what `load` could not use, for log and events."""

    directory: Path
    backbone: str
    base_head: str
    problems: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.directory / f"{state_name(self.backbone, self.base_head)}.npz"

    @property
    def _previous(self) -> Path:
        return self.path.with_name(f"{self.path.name}.prev")

    @property
    def _staged(self) -> Path:
        return self.path.with_name(f"{self.path.name}.staged")

    def load(self) -> LearnedState | None:
        """The newest usable version, or None to start from the bundle's head. Changes nothing on the disk."""
        self.problems.clear()
        for path in (self._staged, self.path, self._previous):
            if not path.exists():
                continue
            try:
                state, base_head = read_state(path.read_bytes(), path)
            except (ArtifactError, OSError) as error:
                self.problems.append(f"learned state not used: {error}")
                continue
            if base_head == self.base_head:
                return state
            self.problems.append(f"learned state not used: {path}: it is of another head")
        return None

    def stage(self, state: LearnedState) -> None:
        """Write what a model that is about to serve takes over; `unstage` takes it back before any model is loaded.

        Raises:
            LearningError: the disk does not take it.
        """
        with self._writing():
            write_atomic(self._staged, encode_state(state, self.base_head))

    def unstage(self) -> None:
        """Remove what an install that was cut off has left: its model has never served."""
        with self._writing():
            if self._staged.exists():
                self._staged.unlink()
                sync_directory(self.directory)

    def save(self, state: LearnedState) -> None:
        """Commit a version; a power cut leaves this one or the one before.

        Raises:
            LearningError: the disk does not take it.
        """
        with self._writing():
            self._write(encode_state(state, self.base_head))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LearningError(
                f"{self.path}: cannot be written ({error}); nothing was learned, make room on the disk"
            ) from error

    def _write(self, content: bytes) -> None:
        """Write the new version beside the two, then rename: whenever the power goes, one of them is whole and named."""
        new = self.path.with_name(f"{self.path.name}.new")
        write_atomic(new, content)
        if _is_sound(self._staged):
            os.replace(self._staged, self.path)
        if _is_sound(self.path):
            os.replace(self.path, self._previous)
        os.replace(new, self.path)
        self._staged.unlink(missing_ok=True)  # still there only where it is damaged
        sync_directory(self.directory)


def state_name(backbone: str, base_head: str) -> str:
    """How the files of a backbone and a shipped head begin."""
    return f"{backbone}.{base_head[:HEAD_DIGITS]}"


def remove_stale(directory: Path, slots: Iterable[Path]) -> None:
    """Delete the state of backbones and heads that are in none of these slot directories."""
    if not directory.is_dir():
        return
    try:
        manifests = [read_manifest(slot) for slot in slots if slot.is_dir()]
        keep = tuple(
            f"{state_name(artifact.backbone, manifest.files[HEAD_NAME].sha256)}."
            for manifest in manifests
            if HEAD_NAME in manifest.files
            for artifact in manifest.artifacts
        )
        for path in directory.iterdir() if keep else ():
            if not path.name.startswith(keep):
                path.unlink()
                log.info("%s: removed, its backbone and head are in no slot any more", path)
    except (ArtifactError, OSError) as error:  # a slot that cannot be read now may be whole again later
        log.warning("%s: old learned states are kept: %s", directory, error)


def _is_sound(path: Path) -> bool:
    try:
        read_state(path.read_bytes(), path)
    except (ArtifactError, OSError):
        return False
    return True


def encode_state(state: LearnedState, base_head: str) -> bytes:
    """The file of a state, and of the head it started from (its SHA-256): an .npz."""
    buffer = io.BytesIO()
    arrays = {f"state/{name}": array for name, array in state.arrays.items()}
    if state.kept is not None:
        arrays |= {"kept/features": state.kept.features, "kept/labels": state.kept.labels}
    arrays |= {f"history/{name}": array for name, array in to_arrays(state.history).items()}
    if state.start is not None:
        arrays |= {f"start/{name}": array for name, array in state.start.arrays.items()}
        arrays |= {"start_labels": np.array(state.start.labels)}
        arrays |= {"start_kept/features": state.start.kept.features, "start_kept/labels": state.start.kept.labels}
    np.savez(
        buffer,
        allow_pickle=False,
        labels=np.array(state.labels),
        version=np.array(state.version),
        base_head=np.array(base_head),
        lessons=np.array(state.lessons[-LESSONS_REMEMBERED:], np.str_),
        **arrays,
    )
    return buffer.getvalue()


def read_state(content: bytes, path: Path) -> tuple[LearnedState, str]:
    """What `encode_state` wrote; ArtifactError names the file where it is damaged."""
    arrays = read_arrays(io.BytesIO(content), name=path)
    kept = arrays_under(arrays, "kept")
    try:
        state = LearnedState(
            labels=tuple(str(label) for label in arrays["labels"]),
            version=int(arrays["version"]),
            arrays=arrays_under(arrays, "state"),
            kept=Examples(kept["features"], kept["labels"]) if kept else None,
            lessons=tuple(str(lesson) for lesson in arrays.get("lessons", ())),
            history=from_arrays(arrays_under(arrays, "history")),
            start=_read_start(arrays),
        )
        return state, str(arrays["base_head"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: no learned state ({error})") from error


def _read_start(arrays: dict[str, np.ndarray]) -> Start | None:
    if "start_labels" not in arrays:
        return None
    kept = arrays_under(arrays, "start_kept")
    return Start(
        labels=tuple(str(label) for label in arrays["start_labels"]),
        arrays=arrays_under(arrays, "start"),
        kept=Examples(kept["features"], kept["labels"]),
    )
