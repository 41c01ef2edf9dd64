"""Reading the files of an update repository, wherever they are. The web is in `device.web`.

A source gives bytes and no trust: whoever reads from it checks them. It must also not be able to hold a reader for ever.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from device.contract.errors import UpdateRefusedError

CHUNK_BYTES = 1 << 16


class FetchError(Exception):
    """A file cannot be read; `reason` is the stable word of a refusal."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class MissingError(FetchError):
    """The source says that it has no such file."""

    def __init__(self, message: str) -> None:
        super().__init__("unreachable", message)


class CutOffError(FetchError):
    """The transfer broke; asking for the rest may help."""

    def __init__(self, message: str) -> None:
        super().__init__("unreachable", message)


class RangeError(FetchError):
    """The source cannot start in the middle of a file, or not there."""

    def __init__(self, message: str) -> None:
        super().__init__("unreachable", message)


class Fetch(Protocol):
    """A source of files."""

    name: str
    """For messages; holds no secret."""
    is_near: bool
    """Whether reading costs no transfer, as from a stick."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes of a file from `start` up to `end`, or to its end; FetchError when they do not come."""
        ...

    def close(self) -> None:
        """Let go of what `read` holds open."""
        ...


class DirectoryFetch:
    """Files of a directory, for example on a stick."""

    is_near = True

    def __init__(self, directory: Path) -> None:
        self._directory, self.name = directory, str(directory)

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        full = self._directory / path
        try:
            with open(full, "rb", opener=_open_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise FetchError("unreachable", f"{full.name} is no ordinary file")
                file.seek(start)
                left = end - start if end is not None else None
                while chunk := file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
                    left = left - len(chunk) if left is not None else None
                    yield chunk
        except FileNotFoundError as error:
            raise MissingError(f"{full.name} is missing") from error
        except OSError as error:
            raise FetchError("unreachable", f"{full.name} cannot be read ({error.strerror})") from error

    def close(self) -> None: ...


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe on a stick would wait for its other end for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


class Pace:
    """Slows a transfer down to what the operator allows, and stops it when it is no longer wanted.

    Args:
        max_bytes_per_s: 0 for no limit.
        refusal: why to stop now, asked between two chunks; None to go on.
        pause: waits; a stop should end it early.
    """

    def __init__(
        self,
        max_bytes_per_s: float = 0.0,
        *,
        refusal: Callable[[], UpdateRefusedError | None] = lambda: None,
        pause: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes_per_s, self._refusal, self.pause, self._clock = max_bytes_per_s, refusal, pause, clock
        self._free_at = clock()

    def passed(self, count: int) -> None:
        """Account for `count` bytes that have come; UpdateRefusedError when no more should."""
        if self._max_bytes_per_s:
            self._free_at = max(self._free_at, self._clock()) + count / self._max_bytes_per_s
            while (wait_s := self._free_at - self._clock()) > 0:
                self.check()
                self.pause(min(wait_s, 1.0))
        self.check()

    def check(self) -> None:
        if refusal := self._refusal():
            raise refusal
