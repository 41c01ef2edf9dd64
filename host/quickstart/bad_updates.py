"""Three updates that must not get in: wrong keys, damaged on the way, and properly signed but broken inside."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from converters.bundle import write_bundle
from device.contract.bundle import extract
from device.contract.errors import ArtifactError
from device.contract.manifest import MANIFEST_NAME, FileEntry, Manifest
from host.fleet.repository import UpdateRepository, published_digest

LARGE_CONSTANT_BYTES = 1024
_WORD = 4


def wrongly_signed(bundle: Path, directory: Path, channel: str) -> Path:
    """A repository with a newer release, signed by keys that no board was told to trust."""
    newer = rebuild(bundle, directory / "stranger", damage_model=False)
    repository = UpdateRepository.open_or_create(directory / "stranger" / "updates", directory / "stranger" / "keys")
    repository.publish(newer, channel)
    return repository.directory


def damaged_on_the_way(repository: Path, name: str, directory: Path) -> Path:
    """A copy of the repository in which one byte of a signed bundle has changed."""
    copy = directory / "damaged" / "updates"
    shutil.copytree(repository, copy)
    digest = published_digest(copy, name)
    path = copy / "targets" / f"{digest}.{name}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return copy


def broken_inside(bundle: Path, directory: Path, repository: UpdateRepository, channel: str) -> Path:
    """Publish a release whose weights are noise: hashes and signatures are right, the answers are not."""
    broken = rebuild(bundle, directory / "broken", damage_model=True)
    repository.publish(broken, channel)
    return broken


def rebuild(bundle: Path, directory: Path, *, damage_model: bool) -> Path:
    """Build the next release from a bundle, with the model's weights overwritten if asked."""
    directory.mkdir(parents=True, exist_ok=True)
    content = directory / "content"
    shutil.rmtree(content, ignore_errors=True)
    manifest = extract(bundle, content)
    files = {name: (content / name).read_bytes() for name in manifest.files}
    if damage_model:
        for artifact in manifest.artifacts:
            files[artifact.path] = _overwrite_weights(files[artifact.path])
    renewed = _next_release(manifest, files)
    path = directory / f"{renewed.name}-{renewed.version}.fieldvit"
    write_bundle({**files, MANIFEST_NAME: renewed.to_json().encode()}, path)
    return path


def _next_release(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    major, minor, patch = manifest.version.split(".")
    entries = {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)) for name, data in files.items()
    }
    return replace(manifest, version=f"{major}.{minor}.{int(patch) + 1}", release=manifest.release + 1, files=entries)


def _overwrite_weights(model: bytes) -> bytes:
    """Reverse the order of the words in every large constant, in place: a sound file whose weights are nonsense.

    Raises:
        ArtifactError: there is no constant that large; the model would be as good as before.
    """
    constants = [(start, size) for start, size in _constants(model) if size >= LARGE_CONSTANT_BYTES]
    if not constants:
        raise ArtifactError(f"the model has no constant of {LARGE_CONSTANT_BYTES} bytes to overwrite")
    content = bytearray(model)
    for start, size in constants:
        words = np.frombuffer(model, "<u4", count=size // _WORD, offset=start)
        content[start : start + words.nbytes] = words[::-1].tobytes()
    return bytes(content)


def _constants(model: bytes) -> Iterator[tuple[int, int]]:
    """Where the constants of a TFLite file lie, as (start, bytes)."""
    from ai_edge_litert.tools import flatbuffer_utils

    for buffer in flatbuffer_utils.convert_bytearray_to_object(bytearray(model)).buffers:
        if buffer.size:  # behind the flatbuffer, as the quantizer writes it
            yield buffer.offset, buffer.size
        elif buffer.data is not None:
            data = bytes(bytearray(buffer.data))
            yield model.index(data), len(data)
