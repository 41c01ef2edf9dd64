"""Reading a bundle, `NAME-VERSION.fieldvit`: a stored zip whose manifest lists every other file with size and SHA-256.

The signature is TUF's, over the whole file, and is checked before anything here runs. What is checked here protects
against damage afterwards and against a bundle that was built wrongly: unsafe paths, extra or missing files, wrong bytes.
"""

import hashlib
import os
import struct
import zipfile
import zlib
from pathlib import Path

from device.contract.errors import ArtifactError, ChecksumError
from device.contract.manifest import MANIFEST_NAME, FileEntry, Manifest, require_safe_path

MAX_MANIFEST_BYTES = 4 << 20
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
"""What `zipfile` raises on a damaged file; a flipped bit may claim encryption, compression or bytes beyond the end."""


def read_manifest(bundle: Path) -> Manifest:
    """Read and check the manifest of a bundle file, or of a directory that `extract` made.

    Raises:
        ArtifactError: the file is missing, is no bundle, or its manifest is wrong.
    """
    if bundle.is_dir():
        return _manifest_of_directory(bundle)
    with _open(bundle) as archive:
        return _manifest_of_archive(archive, bundle)


def extract(bundle: Path, directory: Path) -> Manifest:
    """Check every file of a bundle against its manifest and write it under `directory`, synced to disk.

    Raises:
        ArtifactError: unsafe, missing or unlisted files.
        ChecksumError: a file's bytes are not the manifest's.
    """
    with _open(bundle) as archive:
        manifest = _manifest_of_archive(archive, bundle)
        _require_same_names(set(archive.namelist()) - {MANIFEST_NAME}, set(manifest.files), bundle)
        directory.mkdir(parents=True, exist_ok=True)
        for name, entry in manifest.files.items():
            _write_synced(directory / name, _read_member(archive, name, entry))
        _write_synced(directory / MANIFEST_NAME, manifest.to_json().encode())
    _sync_directories(directory)
    return manifest


def verify_directory(directory: Path) -> Manifest:
    """Check an extracted bundle against its manifest again, before it is loaded."""
    manifest = _manifest_of_directory(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{directory}: {name} is missing; install the bundle again")
        _require_match(name, path.read_bytes(), entry)
    return manifest


def _open(bundle: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(bundle)
    except FileNotFoundError as error:
        raise ArtifactError(f"{bundle}: no such bundle; build one with 'fieldvit export'") from error
    except _DAMAGE as error:
        raise ArtifactError(f"{bundle}: not a bundle ({error}); build it again with 'fieldvit export'") from error


def _manifest_of_archive(archive: zipfile.ZipFile, bundle: Path) -> Manifest:
    try:
        info = archive.getinfo(MANIFEST_NAME)
    except KeyError as error:
        raise ArtifactError(f"{bundle}: has no {MANIFEST_NAME}; it is not a FieldViT bundle") from error
    if info.file_size > MAX_MANIFEST_BYTES or info.compress_type != zipfile.ZIP_STORED:
        raise ArtifactError(f"{bundle}: {MANIFEST_NAME} is compressed or over {MAX_MANIFEST_BYTES} bytes")
    return Manifest.from_json(_read_bytes(archive, info))


def _manifest_of_directory(directory: Path) -> Manifest:
    try:
        return Manifest.from_json((directory / MANIFEST_NAME).read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{directory}: has no {MANIFEST_NAME}; install a bundle there first") from error


def _require_same_names(found: set[str], listed: set[str], bundle: Path) -> None:
    if found != listed:
        odd = ", ".join(sorted(found ^ listed))
        raise ArtifactError(f"{bundle}: files and manifest disagree about {odd}; build the bundle again")


def _read_member(archive: zipfile.ZipFile, name: str, entry: FileEntry) -> bytes:
    require_safe_path(name)
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != entry.bytes:
        raise ArtifactError(
            f"{name}: {info.file_size} bytes in the bundle, {entry.bytes} in its manifest; copy it again"
        )
    content = _read_bytes(archive, info)
    _require_match(name, content, entry)
    return content


def _read_bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except _DAMAGE as error:
        raise ArtifactError(f"{info.filename}: damaged ({error!r}); copy the bundle again") from error


def _require_match(name: str, content: bytes, entry: FileEntry) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != entry.sha256:
        raise ChecksumError(name, expected=entry.sha256, actual=actual)


def _write_synced(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directories(directory: Path) -> None:
    for path in [directory, *(entry for entry in directory.rglob("*") if entry.is_dir())]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
