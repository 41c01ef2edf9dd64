"""Arrays whose bytes depend on nothing but their values, hashes of files, and paths that people write."""

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def deterministic_npz(arrays: "Mapping[str, np.ndarray]") -> bytes:
    """An uncompressed .npz without times: equal arrays give equal bytes."""
    import numpy as np  # recipes are read without it

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME), content.getvalue())
    return buffer.getvalue()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def absolute(path: str, folder: Path) -> str:
    """A path that somebody wrote, seen from `folder`; `~` is the home directory."""
    return str((folder / os.path.expanduser(path)).absolute())
