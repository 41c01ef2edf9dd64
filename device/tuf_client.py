"""The update source, checked after The Update Framework. The only module that imports tuf.

    SOURCE/metadata, SOURCE/targets   static files that 'fieldvit publish' wrote
    ROOT/root.json                    the root metadata this board was given, where all trust starts
    ROOT/tuf/                         metadata that was verified; kept, so an older repository is noticed
    ROOT/downloads/                   verified bundles

Every failure is one UpdateRefusedError with a stable reason:

    signature    metadata is not signed by the keys this board trusts, or is no metadata
    checksum     a file's bytes are not the signed ones
    rollback     the source is older than what this board has seen
    expired      the metadata's time is over (or this board's clock is wrong)
    too-large    a file is longer than signed for, or does not fit on the disk
    unreachable  the source, or a file of it, is not there
    no-channel   the source does not offer this channel
    disk         this board's disk is full, or fails
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tuf.api import exceptions
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from device.contract.errors import ConfigError, UpdateRefusedError
from device.contract.files import sync_directory

CHANNEL_SCHEMA = 1
ROOMS_NEEDED = 3
"""Times its size that a bundle needs on the disk: download, extracted slot, and slack."""
_BUNDLE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}-\d+\.\d+\.\d+\.fieldvit")
_ADVICE = {
    "signature": "do not use it, or give this board the right root.json",
    "checksum": "copy the repository again",
    "rollback": "publish to it again, or use the newer repository",
    "expired": "publish again to renew it, and check this board's clock",
    "too-large": "copy the repository again",
    "unreachable": "mount it, or check update.source in agent.toml",
    "disk": "make room on this board's disk, or check it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a channel points at."""

    bundle: str
    release: int
    sha256: str
    bytes: int


class UpdateSource:
    """One look at a repository: `offer`, then `download`. Make a new one for each check."""

    def __init__(self, directory: Path, root: Path) -> None:
        """Start from the board's trusted root.

        Args:
            directory: the repository.
            root: the agent's data directory.

        Raises:
            ConfigError: there is no trusted root, or it is damaged.
            UpdateRefusedError: the source is not there, or this board's disk fails.
        """
        self._directory = directory
        self._downloads = root / "downloads"
        if not os.path.isdir(directory / "metadata"):  # pathlib's raises where a stick was pulled out
            raise _refusal("unreachable", directory, "it has no 'metadata' directory")
        trusted = _read_root(root / "root.json")
        try:
            with self._refusing_disk():
                for path in (root / "tuf", self._downloads):
                    path.mkdir(parents=True, exist_ok=True)
                self._updater = Updater(
                    str(root / "tuf"),
                    (directory / "metadata").resolve().as_uri(),
                    str(self._downloads),
                    (directory / "targets").resolve().as_uri(),
                    fetcher=_FileFetcher(),
                    bootstrap=trusted,
                )
        except exceptions.RepositoryError as error:
            raise ConfigError(
                f"{root / 'root.json'}: no usable root metadata ({error}); copy 1.root.json of your repository"
            ) from error

    def offer(self, channel: str) -> Offer:
        """Refresh the metadata and look the channel up; UpdateRefusedError says why not."""
        with self._refusing():
            self._updater.refresh()
            pointer_info = self._updater.get_targetinfo(f"channels/{channel}.json")
        if pointer_info is None:
            raise UpdateRefusedError(
                "no-channel",
                f"{self._directory}: has no channel {channel!r}; 'fieldvit publish --channel {channel}' makes it",
            )
        with self._refusing_disk():
            pointer = self._download(pointer_info, f"channel-{channel}.json")
            content = pointer.read_bytes()
            pointer.unlink()
        name, release = _parse_pointer(content, channel)
        info = self._info(name)
        return Offer(bundle=name, release=release, sha256=info.hashes["sha256"], bytes=info.length)

    def download(self, offer: Offer, *, max_bytes: int) -> Path:
        """Fetch the bundle to ROOT/downloads, verified; a complete earlier download is used again."""
        if offer.bytes > max_bytes:
            raise UpdateRefusedError(
                "too-large", f"{offer.bundle}: {offer.bytes} bytes; this board takes bundles up to {max_bytes}"
            )
        with self._refusing_disk():
            for stale in self._downloads.iterdir():
                if stale.name != offer.bundle:
                    stale.unlink()
            free = shutil.disk_usage(self._downloads).free
            if offer.bytes * ROOMS_NEEDED > free:
                raise UpdateRefusedError(
                    "too-large",
                    f"{offer.bundle}: {offer.bytes} bytes; needs {offer.bytes * ROOMS_NEEDED} free, the disk has {free}",
                )
            return self._download(self._info(offer.bundle), offer.bundle)

    def _info(self, name: str) -> TargetFile:
        with self._refusing():
            info = self._updater.get_targetinfo(name)
        if info is None or "sha256" not in info.hashes:
            raise UpdateRefusedError(
                "no-channel", f"{self._directory}: the channel names {name}, which is not signed for; publish it again"
            )
        return info

    def _download(self, info: TargetFile, name: str) -> Path:
        """python-tuf verifies, then copies in place: let it copy to a temporary name, and rename."""
        final, partial = self._downloads / name, self._downloads / f"{name}.part"
        if self._updater.find_cached_target(info, str(final)):
            return final
        try:
            with self._refusing():
                self._updater.download_target(info, str(partial))
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)  # what an error left
        sync_directory(self._downloads)
        return final

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        with self._refusing_disk():
            try:
                yield
            except (exceptions.RepositoryError, exceptions.DownloadError) as error:
                raise _refusal(_reason(error), self._directory, str(error)) from error

    @contextmanager
    def _refusing_disk(self) -> Iterator[None]:
        """The fetcher wraps what the source raises, so any `OSError` is about this board's own disk."""
        try:
            yield
        except OSError as error:
            raise UpdateRefusedError(
                "disk", f"{self._downloads}: refused (disk): {error}; {_ADVICE['disk']}"
            ) from error


class _FileFetcher(FetcherInterface):
    """Reads `file:` URLs; a missing file must look like HTTP 404, which ends python-tuf's search for a newer root."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(url2pathname(urlsplit(url).path))
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 16):
                    yield chunk
        except FileNotFoundError as error:
            raise exceptions.DownloadHTTPError(f"{path.name} is missing", 404) from error
        except OSError as error:
            raise exceptions.DownloadError(f"{path.name} cannot be read ({error.strerror})") from error


def _reason(error: Exception) -> str:
    reasons: list[tuple[type[Exception], str]] = [
        (exceptions.ExpiredMetadataError, "expired"),
        (exceptions.BadVersionNumberError, "rollback"),
        (exceptions.LengthOrHashMismatchError, "checksum"),
        (exceptions.DownloadLengthMismatchError, "too-large"),
        (exceptions.RepositoryError, "signature"),
    ]
    return next((reason for kind, reason in reasons if isinstance(error, kind)), "unreachable")


def _refusal(reason: str, directory: Path, text: str) -> UpdateRefusedError:
    return UpdateRefusedError(reason, f"{directory}: refused ({reason}): {text}; {_ADVICE[reason]}")


def _read_root(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: the trusted root is missing; copy 1.root.json of your update repository there"
        ) from error


def _parse_pointer(content: bytes, channel: str) -> tuple[str, int]:
    try:
        pointer = json.loads(content)
        schema, name, release = pointer["schema"], pointer["bundle"], pointer["release"]
    except (ValueError, KeyError, TypeError) as error:
        raise UpdateRefusedError(
            "no-channel", f"channel {channel}: its file is not readable ({error}); publish again"
        ) from error
    if (
        schema != CHANNEL_SCHEMA
        or not isinstance(name, str)
        or not _BUNDLE_NAME.fullmatch(name)
        or type(release) is not int
    ):
        raise UpdateRefusedError(
            "no-channel", f"channel {channel}: {pointer!r} is not a bundle this version knows; update the agent"
        )
    return name, release
