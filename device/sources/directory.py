"""Frames from a directory: each new file is one frame, read once, in the order of the names.

A file that cannot be read may still be on its way: it is tried again until it has not changed for `SETTLE_S`, then
reported once and left alone. Files with other suffixes and hidden files are ignored, so write as `x.part` and rename
where you can.

A frame's id is its relative path without suffix: `day/0001.png` is `day/0001`. Where files that lie there would share one
(`a.pgm` and `a.npy`, `a b.pgm` and `a_b.pgm`), each that is read while the others are there gets a hash of its name behind
a `~` instead, always the same. So an id never names two files at a time, whatever order they came in and after a restart.
"""

import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from device.contract.errors import FrameError
from device.frames import SUFFIXES, Frame, read_frame
from device.sources.source import BAD_FRAMES_S, Tally

MAX_ID_CHARACTERS = 200
SETTLE_S = 2.0


class DirectorySource:
    """Watches a directory tree; memory is bounded by the number of files that lie there."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self.tally = Tally()
        self.problem = ""
        self._clock = clock
        self._done: set[str] = set()
        self._ids: dict[str, str] = {}  # of all files that lie there, by name
        self._shared: Counter[str] = Counter()
        self._pending: dict[str, tuple[tuple[int, int], float]] = {}
        self._has_more = False

    def start(self) -> None:
        """Nothing to start: the directory is looked at when it is asked for."""

    def stop(self) -> None:
        """Nothing to stop."""

    def wait(self, timeout_s: float, stop: threading.Event) -> None:
        """Until it is time to look again."""
        stop.wait(0 if self._has_more else timeout_s)

    def poll(self, channels: int) -> Iterator[Frame]:
        """Yield the frames that are new since the last poll and can be read by now."""
        names = _frame_files(self.directory)
        present = set(names)
        self._done &= present
        self._note_ids(present)
        self._pending = {name: state for name, state in self._pending.items() if name in present}
        until, self._has_more = self._clock() + BAD_FRAMES_S, False
        for name in names:
            if name in self._done:
                continue
            if frame := self._read(name, channels):
                yield frame
                until = self._clock() + BAD_FRAMES_S
            elif self._clock() > until:
                self._has_more = True
                return

    def _note_ids(self, present: set[str]) -> None:
        for name in self._ids.keys() - present:
            frame_id = self._ids.pop(name)
            self._shared[frame_id] -= 1
            if not self._shared[frame_id]:
                del self._shared[frame_id]
        for name in present - self._ids.keys():
            self._ids[name] = frame_id_of(name)
            self._shared[self._ids[name]] += 1

    def _id_of(self, name: str) -> str:
        return self._ids[name] if self._shared[self._ids[name]] == 1 else distinct_id_of(name)

    def _read(self, name: str, channels: int) -> Frame | None:
        path = self.directory / name
        try:
            stat = path.stat()
        except OSError:  # gone again
            return None
        try:
            frame = Frame(self._id_of(name), read_frame(path, channels))
        except FrameError as error:
            self._retry_later(name, (stat.st_mtime_ns, stat.st_size), error)
            return None
        self._done.add(name)
        self._pending.pop(name, None)
        return frame

    def _retry_later(self, name: str, stamp: tuple[int, int], error: FrameError) -> None:
        now = self._clock()
        known, since = self._pending.setdefault(name, (stamp, now))
        if known != stamp:
            self._pending[name] = (stamp, now)
        elif now - since >= SETTLE_S:
            self._done.add(name)
            del self._pending[name]
            self.tally.skip(str(error), error.reason)


def list_frames(path: Path) -> list[tuple[str, Path]]:
    """Frame ids and files of a directory, or of one file."""
    if not path.is_dir():
        return [(frame_id_of(path.name), path)]
    names = _frame_files(path)
    ids = [frame_id_of(name) for name in names]
    counts = Counter(ids)
    return [
        (frame_id if counts[frame_id] == 1 else distinct_id_of(name), path / name)
        for name, frame_id in zip(names, ids, strict=True)
    ]


def named_frames(paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """Frame ids and files of all these files and directories; FrameError where one is missing or holds none."""
    files = []
    for path in paths:
        if not path.exists():
            raise FrameError(f"{path}: no such file or directory")
        found = list_frames(path)
        if not found:
            raise FrameError(f"{path}: holds no frames (.npy, .pgm, .ppm, .png, .jpg, ...)")
        files += found
    return files


def frame_id_of(name: str) -> str:
    """A frame's id: its relative path without suffix, with white space and control characters replaced."""
    return re.sub(r"[^\w./-]", "_", str(Path(name).with_suffix("")))[-MAX_ID_CHARACTERS:]


def distinct_id_of(name: str) -> str:
    """The id of a frame whose plain id belongs to other files too: with `~` and a hash of its whole name."""
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f"{frame_id_of(name)[9 - MAX_ID_CHARACTERS :]}~{digest}"


def _frame_files(directory: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = "" if folder == str(directory) else os.path.relpath(folder, directory) + os.sep
        names += [prefix + name for name in files if _is_frame(name)]
    return sorted(names)


def _is_frame(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
