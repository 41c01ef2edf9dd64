"""The lock on a data directory: one agent, or one verb that changes slots, at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device.contract.errors import AgentBusyError, ConfigError


@contextmanager
def agent_lock(root: Path, purpose: str) -> Iterator[None]:
    """Hold the data directory's lock: one agent, or one verb that changes slots, at a time.

    Raises:
        AgentBusyError: another process holds it.
        ConfigError: the directory cannot be written.
    """
    path = root / "agent.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror}); create {root} and make it writable") from error
    try:
        if not _try_lock(descriptor):
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise AgentBusyError(
                f"{root}: is in use by {owner or 'another process'}; stop it first, or send it a command over MQTT"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"'fieldvit-device {purpose}' (process {os.getpid()})\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the kernel does the same when the process is killed


def is_locked(root: Path) -> bool:
    """Whether an agent is running on this data directory."""
    try:
        descriptor = os.open(root / "agent.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
