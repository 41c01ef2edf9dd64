"""What a rollout did, line by line: its state, and its audit log. One directory each: `plan.json` and `journal.jsonl`.

A line is written and synced before what it tells is done, so whoever goes on after a crash knows at least that much, and
doing it again changes nothing: commands have the ids that the journal names. A line that a crash cut off is ignored.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from device.contract.errors import DeviceError
from device.contract.files import write_atomic
from device.contract.records import from_table, to_table
from device.contract.topics import DeviceId
from host.errors import FleetError
from host.monitor.rollout.plan import Plan

PLAN, JOURNAL = "plan.json", "journal.jsonl"
KINDS = (
    *("started", "stage", "paused", "resumed", "aborted", "finished"),
    *("asked", "confirmed", "done", "failed", "revert", "reverted", "stuck"),
)
"""Of the rollout, and of one board: told to update; has it for good; does well with it; does not, or did not take it;
told to go back; is back; will not go back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line. `by` is who did it: a person's name, or "" for the rollout itself."""

    time: float
    kind: str
    device: str = ""
    reason: str = ""
    detail: str = ""
    command: str = ""
    expires: float = 0.0
    stage: int = 0
    by: str = ""


@dataclass(slots=True)
class Board:
    """How far one board is, as the journal tells."""

    state: str
    since: float
    command: str = ""
    expires: float = 0.0
    asked: float = 0.0
    confirmed: float = 0.0
    reason: str = ""
    detail: str = ""


@dataclass(slots=True)
class Progress:
    """What the lines add up to."""

    status: str = "new"  # new | running | paused | aborted | finished
    stage: int = 0
    stage_since: float = 0.0
    reason: str = ""
    boards: dict[str, Board] = field(default_factory=dict)

    def count(self, *states: str) -> int:
        return sum(board.state in states for board in self.boards.values())

    def add(self, entry: Entry) -> None:
        """Take one more line into account."""
        if entry.device:
            self._add_board(entry)
        elif entry.kind in ("started", "resumed"):
            self.status, self.reason = "running", ""
            self.stage_since = entry.time
        elif entry.kind == "stage":
            self.stage, self.stage_since = entry.stage, entry.time
        else:
            self.status, self.reason = entry.kind, entry.reason

    def _add_board(self, entry: Entry) -> None:
        board = self.boards.setdefault(entry.device, Board(state=entry.kind, since=entry.time))
        board.state, board.since = entry.kind, entry.time
        board.reason, board.detail = entry.reason or board.reason, entry.detail or board.detail
        if entry.kind in ("asked", "revert"):
            board.command, board.expires = entry.command, entry.expires
        if entry.kind == "asked":
            board.asked, board.confirmed = entry.time, 0.0
        if entry.kind == "confirmed":
            board.confirmed = entry.time


class Journal:
    """One rollout on the disk. Several processes may write: a person's word comes from another one than the engine's."""

    def __init__(self, directory: Path) -> None:
        """Open one that was created."""
        self.directory = directory
        try:
            table = json.loads((directory / PLAN).read_bytes())
        except OSError as error:
            raise FleetError(
                f"{directory.name}: there is no such rollout; 'fieldvit rollout list' shows all"
            ) from error
        except ValueError as error:
            raise FleetError(f"{directory / PLAN}: is damaged ({error}); restore it from a backup") from error
        self.plan = from_table(Plan, table, where=str(directory / PLAN), error=FleetError)
        self.progress = Progress()
        self._read = 0
        self.refresh()

    @classmethod
    def create(cls, root: Path, plan: Plan) -> "Journal":
        """Begin a rollout; FleetError where its name is taken."""
        directory = root / plan.id
        try:
            directory.mkdir(parents=True)
        except FileExistsError as error:
            raise FleetError(f"rollout {plan.id}: is there already; choose another --id") from error
        write_atomic(directory / PLAN, json.dumps(to_table(plan), indent=1).encode())
        journal = cls(directory)
        journal.append(Entry(time=plan.created, kind="started", by=plan.by))
        return journal

    def append(self, entry: Entry) -> None:
        """Write one line, for good. FleetError where the disk does not take it."""
        with self._alone() as file:
            self._take_new_lines(file)
            line = {name: value for name, value in to_table(entry).items() if value not in ("", 0, 0.0)}
            is_torn = file.seek(0, os.SEEK_END) > self._read
            try:
                file.write(b"\n" * is_torn + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise FleetError(f"{self.directory / JOURNAL}: cannot be written ({error}); make room") from error
            self._take_new_lines(file)

    def refresh(self) -> None:
        """Take in what others wrote."""
        with self._alone() as file:
            self._take_new_lines(file)

    def entries(self) -> list[Entry]:
        """All lines, oldest first."""
        return list(_entries((self.directory / JOURNAL).read_bytes()))

    @contextmanager
    def _alone(self) -> Iterator[BinaryIO]:
        with (self.directory / JOURNAL).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            yield file

    def _take_new_lines(self, file: BinaryIO) -> None:
        file.seek(self._read)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for entry in _entries(whole):
            self.progress.add(entry)
        self._read += len(whole)


def _entries(content: bytes) -> Iterator[Entry]:
    for line in content.split(b"\n")[:-1]:
        try:
            table: Any = json.loads(line)
            entry = from_table(Entry, table, where=JOURNAL, error=FleetError)
        except (ValueError, DeviceError, FleetError):  # cut off by a crash
            continue
        if entry.kind in KINDS:
            yield entry


def parse_device(name: str) -> DeviceId:
    """The board of an entry."""
    site, _, device = name.partition("/")
    return DeviceId(site, device)
