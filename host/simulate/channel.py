"""A channel of an update repository, as boards follow it: verified by python-tuf, once for all boards of a process.

Metadata and bundle are checked when `timestamp.json` has changed, and what was found is answered from then on; a bundle is
read where it lies and copied nowhere. The trusted root is the repository's first one, as a flashed board has it.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tuf.api import exceptions
from tuf.ngclient import FetcherInterface, Updater

from device.contract.bundle import read_manifest
from device.contract.errors import ArtifactError, UpdateRefusedError
from host.simulate.release import Release

CHANNEL_SCHEMA = 1
CHUNK_BYTES = 1 << 16
_ADVICE = {
    "signature": "do not use it, or give the boards the right root.json",
    "checksum": "copy the repository again",
    "expired": "renew it with 'fieldvit publish sign'",
    "unreachable": "mount it, or name another --updates",
}


class Channel:
    """What one channel of a directory offers."""

    def __init__(self, repository: Path, name: str) -> None:
        self._repository, self._name = repository, name
        self._seen: tuple[int, int] | None = None
        self._found: Release | UpdateRefusedError | None = None

    def offer(self) -> Release:
        """The release that the channel points at; UpdateRefusedError with a board's stable reason."""
        seen = self._stamp()
        if self._found is None or seen != self._seen:
            self._seen = seen
            try:
                self._found = self._look()
            except UpdateRefusedError as error:
                self._found = error
        if isinstance(self._found, UpdateRefusedError):
            raise UpdateRefusedError(self._found.reason, str(self._found))
        return self._found

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = (self._repository / "metadata" / "timestamp.json").stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _look(self) -> Release:
        try:
            root = (self._repository / "metadata" / "1.root.json").read_bytes()
        except OSError as error:
            raise self._refusal("unreachable", f"it has no 'metadata' directory ({error.strerror})") from error
        with tempfile.TemporaryDirectory(prefix="fieldvit-channel-") as scratch:
            try:
                updater = Updater(scratch, "metadata/", fetcher=_DirectoryFetcher(self._repository), bootstrap=root)
                return self._read(updater)
            except exceptions.ExpiredMetadataError as error:
                raise self._refusal("expired", str(error)) from error
            except exceptions.LengthOrHashMismatchError as error:
                raise self._refusal("checksum", str(error)) from error
            except exceptions.RepositoryError as error:
                raise self._refusal("signature", str(error)) from error
            except (exceptions.DownloadError, OSError) as error:
                raise self._refusal("unreachable", str(error)) from error

    def _read(self, updater: Updater) -> Release:
        updater.refresh()
        pointer_info = updater.get_targetinfo(f"channels/{self._name}.json")
        if pointer_info is None:
            advice = f"'fieldvit publish --channel {self._name}' makes it"
            raise UpdateRefusedError("no-channel", f"{self._repository}: has no channel {self._name!r}; {advice}")
        content = self._target(pointer_info.path, pointer_info.hashes["sha256"]).read_bytes()
        pointer_info.verify_length_and_hashes(content)
        pointer = json.loads(content)
        if pointer["schema"] != CHANNEL_SCHEMA:
            raise UpdateRefusedError("schema", f"channel {self._name}: its schema is {pointer['schema']!r}")
        info = updater.get_targetinfo(pointer["bundle"])
        if info is None:
            raise UpdateRefusedError("no-channel", f"channel {self._name}: {pointer['bundle']} is not signed for")
        bundle = self._target(info.path, info.hashes["sha256"])
        with bundle.open("rb") as file:
            info.verify_length_and_hashes(file)
        try:
            manifest = read_manifest(bundle)
        except ArtifactError as error:
            raise UpdateRefusedError("damaged", f"{pointer['bundle']}: {error}") from error
        if (
            manifest.release != pointer["release"]
            or f"{manifest.name}-{manifest.version}.fieldvit" != pointer["bundle"]
        ):
            raise UpdateRefusedError("pointer", f"{pointer['bundle']}: its manifest says otherwise; publish it again")
        return Release.from_manifest(manifest, sha256=info.hashes["sha256"], size=info.length)

    def _target(self, name: str, sha256: str) -> Path:
        folder, slash, base = name.rpartition("/")
        return self._repository / "targets" / f"{folder}{slash}{sha256}.{base}"

    def _refusal(self, reason: str, text: str) -> UpdateRefusedError:
        return UpdateRefusedError(reason, f"{self._repository}: refused ({reason}): {text}; {_ADVICE[reason]}")


class _DirectoryFetcher(FetcherInterface):
    """Reads files for python-tuf; a missing one must look like HTTP 404, which ends its search for a newer root."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            with (self._repository / url).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except FileNotFoundError as error:
            raise exceptions.DownloadHTTPError(str(error), 404) from error
