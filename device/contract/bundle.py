"""Reading a bundle, `NAME-VERSION.fieldvit`: a stored zip whose manifest lists every other file with size and SHA-256.

The signature is TUF's, over the whole file, and is checked before anything here runs. What is checked here protects
against damage afterwards and against a bundle that was built wrongly: unsafe paths, extra or missing files, wrong bytes.
"""

import hashlib
import os
from collections.abc import Mapping, Set
from pathlib import Path

from device.contract.errors import ArtifactError, ChecksumError
from device.contract.manifest import MANIFEST_NAME, FileEntry, Manifest
from device.contract.zipped import Member, list_members, read_member

MAX_MANIFEST_BYTES = 4 << 20


def read_manifest(bundle: Path) -> Manifest:
    """Read and check the manifest of a bundle file, or of a directory that `extract` made.

    Raises:
        ArtifactError: the file is missing, is no bundle, or its manifest is wrong.
    """
    if bundle.is_dir():
        return _manifest_of_directory(bundle)
    return Manifest.from_json(_manifest_bytes(bundle, list_members(bundle)))


def extract(bundle: Path, directory: Path) -> Manifest:
    """Check every file of a bundle against its manifest and write it under `directory`, synced to disk.

    Raises:
        ArtifactError: unsafe, missing or unlisted files.
        ChecksumError: a file's bytes are not the manifest's.
    """
    members = list_members(bundle)
    text = _manifest_bytes(bundle, members)
    manifest = Manifest.from_json(text)
    _require_same_names(members.keys() - {MANIFEST_NAME}, manifest.files.keys(), bundle)
    directory.mkdir(parents=True, exist_ok=True)
    for name, entry in manifest.files.items():
        _write_synced(directory / name, _read_listed(bundle, members[name], entry))
    _write_synced(directory / MANIFEST_NAME, text)
    _sync_directories(directory)
    return manifest


def verify_directory(directory: Path) -> Manifest:
    """Check an extracted bundle against its manifest again, before it is loaded."""
    manifest = _manifest_of_directory(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{directory}: {name} is missing; install the bundle again")
        with path.open("rb") as file:  # in parts: a model read whole would stay in the process as free memory
            _require_digest(name, hashlib.file_digest(file, "sha256").hexdigest(), entry)
    return manifest


def _manifest_bytes(bundle: Path, members: Mapping[str, Member]) -> bytes:
    member = members.get(MANIFEST_NAME)
    if member is None:
        raise ArtifactError(f"{bundle}: has no {MANIFEST_NAME}; it is not a FieldViT bundle")
    if member.bytes > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{bundle}: {MANIFEST_NAME} has over {MAX_MANIFEST_BYTES} bytes; build the bundle again")
    return read_member(bundle, member)


def _manifest_of_directory(directory: Path) -> Manifest:
    try:
        return Manifest.from_json((directory / MANIFEST_NAME).read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{directory}: has no {MANIFEST_NAME}; install a bundle there first") from error


def _require_same_names(found: Set[str], listed: Set[str], bundle: Path) -> None:
    if found != listed:
        odd = ", ".join(sorted(map(repr, found ^ listed)))
        raise ArtifactError(f"{bundle}: files and manifest disagree about {odd}; build the bundle again")


def _read_listed(bundle: Path, member: Member, entry: FileEntry) -> bytes:
    if member.bytes != entry.bytes:
        raise ArtifactError(
            f"{member.name}: {member.bytes} bytes in the bundle, {entry.bytes} in its manifest; copy it again"
        )
    content = read_member(bundle, member)
    _require_digest(member.name, hashlib.sha256(content).hexdigest(), entry)
    return content


def _require_digest(name: str, actual: str, entry: FileEntry) -> None:
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
