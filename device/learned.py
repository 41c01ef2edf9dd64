"""What a board has learned, on its disk: `ROOT/state/BACKBONE-SHA256.npz`, and the version before as `.prev`.

The file is named by the backbone whose features it was learned on, and holds the hash of the head it started from: after
another backbone, or another head from the host, it is not loaded. A damaged file is never repaired: the version before is
used, or the bundle's own head.
"""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from device.contract.errors import ArtifactError
from device.contract.files import sync_directory, write_atomic
from device.golden import arrays_under, read_arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedState:
    """One committed version: all labels, the shipped ones first, and the learner's arrays."""

    labels: tuple[str, ...]
    version: int
    arrays: dict[str, np.ndarray]


@dataclass(slots=True)
class LearnedStore:
    """The learned state of one backbone and head. `problems` tells what `load` could not use, for log and events."""

    directory: Path
    backbone: str
    base_head: str
    problems: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.directory / f"{self.backbone}.npz"

    @property
    def _previous(self) -> Path:
        return self.directory / f"{self.backbone}.npz.prev"

    def load(self) -> LearnedState | None:
        """The newest usable version, or None to start from the bundle's head. Changes nothing on the disk."""
        self.problems.clear()
        for path in (self.path, self._previous):
            if not path.exists():
                continue
            try:
                return self._read(path)
            except ArtifactError as error:
                self.problems.append(f"learned state not used: {error}")
        return None

    def save(self, state: LearnedState) -> None:
        """Commit a version; a power cut leaves this one or the one before."""
        buffer = io.BytesIO()
        arrays = {f"state/{name}": array for name, array in state.arrays.items()}
        np.savez(
            buffer,
            allow_pickle=False,
            labels=np.array(state.labels),
            version=np.array(state.version),
            base_head=np.array(self.base_head),
            **arrays,
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            os.replace(self.path, self._previous)
            sync_directory(self.directory)
        write_atomic(self.path, buffer.getvalue())

    def _read(self, path: Path) -> LearnedState:
        arrays = read_arrays(path)
        try:
            base_head = str(arrays["base_head"])
            labels = tuple(str(label) for label in arrays["labels"])
            version = int(arrays["version"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: no learned state ({error})") from error
        if base_head != self.base_head:
            raise ArtifactError(f"{path}: was learned on another head than this bundle's; the bundle's head is used")
        return LearnedState(labels=labels, version=version, arrays=arrays_under(arrays, "state"))
