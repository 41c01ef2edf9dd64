"""Writing a bundle: the same files give the same bytes, anywhere, any day. `device.contract.bundle` reads it."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.flatbuffer import FEATURES, canonical_json, graph_digest
from device.contract.files import write_atomic
from device.contract.manifest import FileEntry, require_safe_path

_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold
_UNIX = 3
_MODE = 0o100644 << 16

Content = bytes | Path


def write_bundle(files: Mapping[str, Content], out_path: Path) -> str:
    """Write files as a stored, sorted zip with fixed times and modes.

    Args:
        files: name in the bundle to its content, or to a file or directory; a directory such as `model.mlpackage`
            brings every file below it.
        out_path: the bundle; appears whole, by one rename.

    Returns:
        SHA-256 of the bundle, hex.

    Raises:
        ConversionError: a file is missing, or two entries have the same name.
        ArtifactError: a name is absolute or leaves the bundle.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(expand(files).items()):
            archive.writestr(_zip_info(name), content)
    content = buffer.getvalue()
    write_atomic(out_path, content)
    return hashlib.sha256(content).hexdigest()


def describe(files: Mapping[str, Content]) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file, as the manifest's `files` wants them."""
    return {
        name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for name, content in sorted(expand(files).items())
    }


def expand(files: Mapping[str, Content]) -> dict[str, bytes]:
    """Read every entry into bytes, directories file by file."""
    contents: dict[str, bytes] = {}
    for name, source in files.items():
        for inner, content in _read(name, source):
            require_safe_path(inner)
            if inner in contents:
                raise ConversionError(f"bundle: two entries are named {inner!r}; rename one")
            contents[inner] = content
    return contents


def backbone_hash(tflite_path: Path, preprocessing: Mapping[str, Any]) -> str:
    """Identity of what turns a frame into features: the `features` graph, its weights, and the pre-processing record.

    A learned head is valid exactly as long as this stays the same. Labels, the base head, the number of classes and
    names inside the file do not change it.
    """
    record = {"features": graph_digest(tflite_path, FEATURES), "preprocessing": dict(preprocessing)}
    return hashlib.sha256(canonical_json(record)).hexdigest()


def _read(name: str, source: Content) -> list[tuple[str, bytes]]:
    if isinstance(source, bytes):
        return [(name, source)]
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        return [(f"{name.rstrip('/')}/{path.relative_to(source).as_posix()}", path.read_bytes()) for path in files]
    try:
        return [(name, source.read_bytes())]
    except OSError as error:
        raise ConversionError(f"bundle: {name} cannot be read from {source} ({error}); export it first") from error


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _TIME)
    info.create_system, info.external_attr = _UNIX, _MODE  # else zipfile writes those of the machine it runs on
    return info
