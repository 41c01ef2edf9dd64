"""The lock on a data directory: one agent, or one verb that changes slots, at a time."""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from device.contract.errors import AgentBusyError, ConfigError

PATIENCE_S = 1.0
"""Whoever only looks who holds the lock has it for a moment himself; an agent that starts then must not give up."""
RETRY_S = 0.02
_OWNER = re.compile(r"'fieldvit-device (\w+)' \(process (\d+)\)")


@dataclass(frozen=True, slots=True)
class LockOwner:
    """The process that holds a data directory: `purpose` is its verb; "" and 0 where that could not be read."""

    purpose: str
    pid: int


@contextmanager
def agent_lock(root: Path, purpose: str) -> Iterator[None]:
    """Hold the data directory's lock: one agent, or one verb that changes slots, at a time.

    Raises:
        AgentBusyError: another process holds it.
        ConfigError: the directory cannot be written.
    """
    path = root / "agent.lock"
    try:
        descriptor = _open(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror}); create {root} and make it writable") from error
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise AgentBusyError(
                    f"{root}: is in use by {_read_text(descriptor) or 'another process'}; "
                    "stop it first, or send it a command over MQTT"
                )
            time.sleep(RETRY_S)
        text = f"'fieldvit-device {purpose}' (process {os.getpid()})\n".encode()
        with suppress(OSError):  # a disk that takes nothing: who holds it cannot be told then
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
        yield
    finally:
        os.close(descriptor)  # releases the lock; the kernel does the same when the process is killed


def lock_owner(root: Path) -> LockOwner | None:
    """Who holds the data directory, or None."""
    try:
        descriptor = os.open(root / "agent.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if _try_lock(descriptor, fcntl.LOCK_SH):  # shared: who only looks does not get into another's way
            return None
        owner = _OWNER.match(_read_text(descriptor))
        return LockOwner(owner[1], int(owner[2])) if owner else LockOwner("", 0)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """For writing, or where the disk has become read-only, as a worn SD card does, for the lock alone."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read_text(descriptor: int) -> str:
    return os.pread(descriptor, 100, 0).decode(errors="replace").partition("\n")[0]


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
