"""An append-only file of JSON lines, synced line by line; a torn last line is what a power cut leaves, and is dropped."""

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from device.contract.errors import ConfigError
from device.contract.files import sync_directory, write_atomic
from device.contract.record import record
from device.contract.records import from_table, to_table

MAX_BYTES = 1 << 20
KEEP_LINES = 500


@record(frozen=True, slots=True, kw_only=True)
class Entry:
    """One state that a slot came into.

    `was` is the state before, `starts` counts the agent's starts on a model in testing, `number` counts entries.
    """

    number: int
    time: float
    slot: str
    state: str
    was: str = "empty"
    bundle: str = ""
    name: str = ""
    version: str = ""
    release: int = 0
    precision: str = ""
    starts: int = 0
    reason: str = ""
    detail: str = ""


_NAMES = {field.name for field in fields(Entry)}
"""What a newer agent wrote besides is passed over: after its runtime was taken back, its models must still be known."""


class Journal:
    """The entries of `ROOT/journal.jsonl`; the file's whole lines are the truth, `entries` mirrors them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self._intact_bytes, self.damaged_lines = _read(path)

    def append(self, entry: Entry) -> None:
        """Write one line; when this returns it survives a power cut, and until then it counts as not written.

        Raises:
            OSError: the disk is full or fails; the journal is as it was.
        """
        line = json.dumps(to_table(entry), ensure_ascii=False).encode() + b"\n"
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(descriptor, self._intact_bytes)  # a torn line would swallow this one
            try:
                _write_all(descriptor, line, self._intact_bytes)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, self._intact_bytes)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            sync_directory(self.path.parent)
        self._intact_bytes += len(line)
        self.entries.append(entry)

    def compact(self, keep: Iterable[Entry]) -> None:
        """Rewrite a journal that has grown past `MAX_BYTES` to its last lines and those in `keep`."""
        if self._intact_bytes <= MAX_BYTES:
            return
        chosen = {entry.number: entry for entry in [*keep, *self.entries[-KEEP_LINES:]]}
        kept = [chosen[number] for number in sorted(chosen)]
        write_atomic(self.path, b"".join(json.dumps(to_table(entry)).encode() + b"\n" for entry in kept))
        self.entries, self._intact_bytes, self.damaged_lines = _read(self.path)


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    """One `pwrite` may write less than it was given, for example when the disk is nearly full."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        content, offset = content[written:], offset + written


def _read(path: Path) -> tuple[list[Entry], int, int]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0, 0
    intact = content[: content.rfind(b"\n") + 1]
    entries, damaged = [], 0
    for line in intact.splitlines():
        try:
            table = json.loads(line)
            entries.append(from_table(Entry, {name: table[name] for name in _NAMES & table.keys()}, where=path.name))
        except (AttributeError, ConfigError, ValueError):  # AttributeError: JSON, but no table
            damaged += 1
    return entries, len(intact), damaged
