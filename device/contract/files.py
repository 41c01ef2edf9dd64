"""Files that are written whole or not at all, through a power cut too."""

import os
from pathlib import Path


def write_atomic(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file so that a reader, or a power cut, sees the old content or the new, never a part.

    The directory is made if it is missing. What a cut leaves behind is one `NAME.tmp`, overwritten by the next write.
    `mode` is that of a new file, less what the process's umask takes away; 0o600 for secrets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    if mode != 0o666:
        partial.unlink(missing_ok=True)  # the mode of a file that is there would stay
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
