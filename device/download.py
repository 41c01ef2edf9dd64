"""Bring one signed file onto the disk: resumed where it was cut off, put together from what the board holds already.

    DOWNLOADS/SHA256.part    what has come so far; it is named by what it will be, so it is gone on with after a restart
    DOWNLOADS/NAME           the whole file, whose SHA-256 was checked

The file grows from front to back. Each stretch of it comes from the source or is copied from a file on this board; in the
end only the signed hash counts, so wrong bytes from anywhere cost time and nothing else.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from device.contract.files import sync_directory
from device.contract.parts import Parts
from device.contract.record import record
from device.fetch import CHUNK_BYTES, CutOffError, Fetch, FetchError, Pace, RangeError

RETRIES = 5
"""So often in a row the rest is asked for though hardly anything came."""
MIN_PROGRESS_BYTES = 1 << 14
"""A connection that breaks before so much came counts as one of these: else a server could break it after every byte."""
RETRY_PAUSE_S = 1.0
MIN_HELD_BYTES = 4096
"""A smaller file is not worth a request of its own for what follows it."""

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A signed file: its name, where the source has it, and what its bytes must be."""

    name: str
    path: str
    bytes: int
    sha256: str


@record(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A verified file, and how many bytes the source had to give for it."""

    path: Path
    transferred_bytes: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    start: int
    end: int
    held: Path | None = None


class Downloads:
    """The directory of downloads, and the source they come from."""

    def __init__(self, directory: Path, fetch: Fetch, pace: Pace, *, retry_pause_s: float = RETRY_PAUSE_S) -> None:
        self._directory, self._fetch, self._pace, self._retry_pause_s = directory, fetch, pace, retry_pause_s
        self._transferred = 0

    def missing_bytes(self, wanted: Wanted) -> int:
        """How many bytes of room the file still needs."""
        if (self._directory / wanted.name).exists():
            return 0
        part = self._part(wanted)
        return max(wanted.bytes - (part.stat().st_size if part.exists() else 0), 0)

    def remove_others(self, wanted: Wanted) -> None:
        """Delete everything but this file and its part."""
        for path in self._directory.iterdir():
            if path.name not in (wanted.name, self._part(wanted).name):
                path.unlink()

    def get(self, wanted: Wanted, parts: Parts | None = None, held: Mapping[str, Path] | None = None) -> Fetched:
        """Fetch a file, or find it complete.

        Args:
            wanted: what is signed for.
            parts: where which files lie in it.
            held: files on this board by SHA-256.

        Raises:
            FetchError: it does not come, or is not what was signed for; what came is kept unless it is wrong.
            UpdateRefusedError: as `Pace` says.
        """
        self._transferred = 0
        final, part = self._directory / wanted.name, self._part(wanted)
        if final.exists() and _sha256(final) == wanted.sha256:
            return Fetched(path=final, transferred_bytes=0)
        plan = plan_of(wanted.bytes, parts, held or {})
        is_whole = len(plan) == 1 and not (part.exists() and part.stat().st_size)
        try:
            self._fill(part, plan, wanted)
            is_right = _sha256(part) == wanted.sha256
        except RangeError as error:
            log.info("%s: %s; transferring all of it", wanted.name, error)
            is_whole = is_right = False
        except OSError:  # the disk is full or fails: what others need of it is not kept for this
            part.unlink(missing_ok=True)
            raise
        if not is_right and not is_whole:  # a damaged part, or a source without ranges
            self._start_again(part, wanted)
            is_right = _sha256(part) == wanted.sha256
        if not is_right:
            part.unlink()
            raise FetchError("checksum", f"{wanted.name}: its bytes are not the signed ones")
        os.replace(part, final)
        sync_directory(self._directory)
        return Fetched(path=final, transferred_bytes=self._transferred)

    def _start_again(self, part: Path, wanted: Wanted) -> None:
        part.unlink(missing_ok=True)
        try:
            self._fill(part, [_Stretch(0, wanted.bytes)], wanted)
        except RangeError as error:  # cut off in the middle of what cannot be gone on with
            raise FetchError("unreachable", f"{error}, and the transfer broke") from error

    def _part(self, wanted: Wanted) -> Path:
        return self._directory / f"{wanted.sha256}.part"

    def _fill(self, part: Path, plan: list[_Stretch], wanted: Wanted) -> None:
        with part.open("ab") as file:
            if file.tell() > wanted.bytes:
                _empty(file)
            try:
                for stretch in plan:
                    if stretch.end > file.tell():
                        self._append(file, stretch, wanted)
            finally:
                file.flush()
                os.fsync(file.fileno())

    def _append(self, file: BinaryIO, stretch: _Stretch, wanted: Wanted) -> None:
        if stretch.held:
            _copy(stretch.held, file, offset=file.tell() - stretch.start, count=stretch.end - file.tell())
            return
        is_last = stretch.end == wanted.bytes
        failures, mark = 0, file.tell()
        while file.tell() < stretch.end:
            try:
                for chunk in self._fetch.read(wanted.path, file.tell(), None if is_last else stretch.end):
                    self._transferred += len(chunk)
                    if file.tell() + len(chunk) > stretch.end:
                        _empty(file)
                        raise FetchError("endless", f"{wanted.name} goes on beyond its {wanted.bytes} signed bytes")
                    file.write(chunk)
                    self._pace.passed(len(chunk))
                if file.tell() < stretch.end:
                    ended = f"{wanted.name} ended after {file.tell()} of {wanted.bytes} bytes"
                    raise FetchError("checksum", ended) if self._fetch.is_near else CutOffError(ended)
            except CutOffError as error:
                has_progress = file.tell() - mark >= MIN_PROGRESS_BYTES
                failures, mark = (1 if has_progress else failures + 1), file.tell()
                if failures > RETRIES:
                    raise
                log.info("%s: %s; asking for the rest", wanted.name, error)
                self._pace.pause(self._retry_pause_s * failures)
                self._pace.check()


def plan_of(size: int, parts: Parts | None, held: Mapping[str, Path]) -> list[_Stretch]:
    """How to put a file of `size` bytes together; one stretch where nothing of it is held."""
    stretches: list[_Stretch] = []
    end = 0
    for part in parts.files if parts and parts.bundle_bytes == size else ():
        if part.sha256 in held and part.bytes >= MIN_HELD_BYTES:
            if part.start > end:
                stretches.append(_Stretch(end, part.start))
            end = part.start + part.bytes
            stretches.append(_Stretch(part.start, end, held[part.sha256]))
    if end < size or not stretches:
        stretches.append(_Stretch(end, size))
    return stretches


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _copy(source: Path, file: BinaryIO, *, offset: int, count: int) -> None:
    """Append `count` bytes; fewer where the source has fewer, which the hash of the whole will tell."""
    with source.open("rb") as held:
        held.seek(offset)
        for chunk in _chunks(held, count):
            file.write(chunk)


def _chunks(file: BinaryIO, count: int) -> Iterator[bytes]:
    while count and (chunk := file.read(min(CHUNK_BYTES, count))):
        count -= len(chunk)
        yield chunk


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
