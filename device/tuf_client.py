"""The update source, checked after The Update Framework. The only module that imports tuf.

    SOURCE/metadata, SOURCE/targets   static files that 'fieldvit publish' wrote, in a directory or on a web server
    ROOT/root.json                    the root metadata this board was given, where all trust starts
    ROOT/tuf/                         metadata that was verified; kept, so an older repository is noticed
    ROOT/downloads/                   verified bundles, and what has come of others

Every failure is one UpdateRefusedError with a stable reason:

    signature    metadata is not signed by enough of the keys this board trusts, or is no metadata
    checksum     a file's bytes are not the signed ones
    rollback     the source is older than what this board has seen
    mixed        metadata files that do not belong together, or are damaged
    expired      the metadata's time is over: the source is frozen, or was not renewed (`device.trusted_time` says by what clock)
    endless      a file goes on beyond the length it was signed with
    slow         the server is silent, or gives almost nothing
    too-large    a file does not fit on this board, or on its disk
    schema       written for a newer agent
    unreachable  the source, or a file of it, is not there
    no-channel   the source does not offer this channel
    disk         this board's disk is full, or fails
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api import exceptions
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from device.contract.errors import ArtifactError, ConfigError, UpdateRefusedError
from device.contract.parts import MAX_PARTS_BYTES, Parts, parts_name
from device.contract.record import record
from device.download import Downloads, Fetched, Wanted
from device.fetch import DirectoryFetch, Fetch, FetchError, MissingError, Pace
from device.trusted_time import TrustedTime

CHANNEL_SCHEMA = 1
ROOMS_NEEDED = 3
"""Times its size that a bundle needs on the disk: download, extracted slot, and slack."""
MAX_POINTER_BYTES = 1 << 16
_BUNDLE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}-\d+\.\d+\.\d+\.fieldvit", re.ASCII)
_ADVICE = {
    "signature": "do not use it, or give this board the right root.json",
    "checksum": "copy the repository again",
    "rollback": "publish to it again, or use the newer repository",
    "mixed": "copy the repository again",
    "expired": "renew it with 'fieldvit publish sign', and check this board's clock",
    "endless": "copy the repository again",
    "slow": "use a better connection or another mirror; what has come is kept",
    "unreachable": "mount it, or check the network, update.source in agent.toml or --from",
    "disk": "make room on this board's disk, or check it",
}

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a channel points at."""

    bundle: str
    release: int
    sha256: str
    bytes: int


class UpdateSource:
    """One look at a repository: `offer`, then `download`. Make a new one for each check."""

    def __init__(self, fetch: Fetch, root: Path, *, time: TrustedTime, pace: Pace | None = None) -> None:
        """Start from the board's trusted root.

        Args:
            fetch: reads the repository's files.
            root: the agent's data directory.
            time: what time it is at least.
            pace: how fast to read, and when to stop.

        Raises:
            ConfigError: there is no trusted root, or it is damaged.
            UpdateRefusedError: this board's disk fails.
        """
        self._fetch, self._time = fetch, time
        self._directory = root / "downloads"
        pace = pace or Pace()
        self._downloads = Downloads(self._directory, fetch, pace)
        trusted = _read_root(root / "root.json")
        try:
            with self._refusing_disk():
                for path in (root / "tuf", self._directory):
                    path.mkdir(parents=True, exist_ok=True)
                self._fetcher = _TufFetcher(fetch, pace)
                self._updater = Updater(
                    str(root / "tuf"), "metadata/", fetcher=self._fetcher, bootstrap=trusted
                )  # its base URLs are directories of ours: `fetch` knows where they are
        except exceptions.RepositoryError as error:
            raise ConfigError(
                f"{root / 'root.json'}: no usable root metadata ({error}); copy 1.root.json of your repository"
            ) from error

    def offer(self, channel: str) -> Offer:
        """Refresh the metadata and look the channel up; UpdateRefusedError says why not."""
        self._refresh()
        with self._refusing():
            pointer_info = self._updater.get_targetinfo(f"channels/{channel}.json")
        if pointer_info is None:
            raise UpdateRefusedError(
                "no-channel",
                f"{self._fetch.name}: has no channel {channel!r}; 'fieldvit publish --channel {channel}' makes it",
            )
        name, release = _parse_pointer(self._read(pointer_info, MAX_POINTER_BYTES), channel)
        info = self._info(name)
        return Offer(bundle=name, release=release, sha256=info.hashes["sha256"], bytes=info.length)

    def download(self, offer: Offer, *, max_bytes: int, held: Mapping[str, Path] | None = None) -> Fetched:
        """Fetch the bundle to ROOT/downloads, verified; a complete earlier download is used again.

        Args:
            offer: what `offer` found.
            max_bytes: the largest bundle this board takes.
            held: files on this board by SHA-256, which need not be transferred.
        """
        if offer.bytes > max_bytes:
            raise UpdateRefusedError(
                "too-large", f"{offer.bundle}: {offer.bytes} bytes; this board takes bundles up to {max_bytes}"
            )
        wanted = Wanted(
            name=offer.bundle, path=_path_of(offer.bundle, offer.sha256), bytes=offer.bytes, sha256=offer.sha256
        )
        with self._refusing():
            self._downloads.remove_others(wanted)
            needed = offer.bytes * (ROOMS_NEEDED - 1) + self._downloads.missing_bytes(wanted)
            free = shutil.disk_usage(self._directory).free
            if needed > free:
                raise UpdateRefusedError(
                    "too-large", f"{offer.bundle}: {offer.bytes} bytes; needs {needed} free, the disk has {free}"
                )
            return self._downloads.get(wanted, self._parts(offer) if held else None, held)

    def _refresh(self) -> None:
        """Bring the metadata up to date, by the latest time that this board knows of before and after."""
        trusted = self._updater._trusted_set  # python-tuf cannot be told what time it is, nor asked what it found
        self._learn(trusted)
        trusted.reference_time = self._time.now()
        try:
            with self._refusing():
                self._updater.refresh()
        finally:
            self._learn(trusted)
            if "timestamp" in trusted:
                self._time.believe(trusted.timestamp.expires)
            self._time.save()
        ended = [signed.type for signed in trusted if signed.is_expired(self._time.now())]
        if ended:
            raise _refusal("expired", self._fetch.name, f"{ended[0]} ended before other metadata were issued")

    def _learn(self, trusted: Any) -> None:
        for signed in trusted:
            issued = _issued(signed.unrecognized_fields)
            if issued and issued < signed.expires:
                self._time.learn(issued)

    def _info(self, name: str) -> TargetFile:
        with self._refusing():
            info = self._updater.get_targetinfo(name)
        if info is None or "sha256" not in info.hashes:
            raise UpdateRefusedError(
                "no-channel", f"{self._fetch.name}: the channel names {name}, which is not signed for; publish it again"
            )
        return info

    def _parts(self, offer: Offer) -> Parts | None:
        """Where which files lie in the bundle; None where the source does not say, or reading costs nothing anyway."""
        info = None if self._fetch.is_near else self._updater.get_targetinfo(parts_name(offer.bundle))
        if info is None or "sha256" not in info.hashes:
            return None
        try:
            return Parts.from_json(self._read(info, MAX_PARTS_BYTES))
        except (ArtifactError, UpdateRefusedError) as error:
            log.warning("%s: %s; transferring all of it", offer.bundle, error)
            return None

    def _read(self, info: TargetFile, max_bytes: int) -> bytes:
        """The content of a small target, verified."""
        with self._refusing():
            if info.length > max_bytes:
                raise FetchError("too-large", f"{info.path} has {info.length} bytes")
            content = self._fetcher.download_bytes(_path_of(info.path, info.hashes["sha256"]), info.length)
            info.verify_length_and_hashes(content)
        return content

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        with self._refusing_disk():
            try:
                yield
            except FetchError as error:
                raise _refusal(error.reason, self._fetch.name, str(error)) from error
            except (exceptions.RepositoryError, exceptions.DownloadError) as error:
                is_refreshed = "targets" in self._updater._trusted_set
                raise _refusal(_reason(error, is_refreshed), self._fetch.name, str(error)) from error

    @contextmanager
    def _refusing_disk(self) -> Iterator[None]:
        """What the source raises is a FetchError, so any `OSError` is about this board's own disk."""
        try:
            yield
        except OSError as error:
            raise UpdateRefusedError(
                "disk", f"{self._directory}: refused (disk): {error}; {_ADVICE['disk']}"
            ) from error


class _TufFetcher(FetcherInterface):
    """Reads for python-tuf; a missing file must look like HTTP 404, which ends its search for a newer root."""

    def __init__(self, fetch: Fetch, pace: Pace) -> None:
        self._source, self._pace = fetch, pace

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            for chunk in self._source.read(url):
                yield chunk
                self._pace.passed(len(chunk))
        except MissingError as error:
            raise exceptions.DownloadHTTPError(str(error), 404) from error


def open_source(location: Path | str, *, ca_file: Path | None = None) -> Fetch:
    """A source of files at a directory or a URL.

    Raises:
        UpdateRefusedError: the directory is no repository.
        ConfigError: the CA file cannot be read.
    """
    if isinstance(location, str):
        from device.web import WebFetch  # here: TLS and HTTP take a while to import

        return WebFetch(location, ca_file=ca_file)
    if not os.path.isdir(location / "metadata"):  # pathlib's raises where a stick was pulled out
        raise _refusal("unreachable", str(location), "it has no 'metadata' directory")
    return DirectoryFetch(location)


def _path_of(name: str, sha256: str) -> str:
    """Where a target lies, relative to the repository."""
    folder, slash, base = name.rpartition("/")
    return f"targets/{folder}{slash}{sha256}.{base}"


def _issued(fields: Mapping[str, Any]) -> datetime | None:
    """When metadata was signed, which `fieldvit publish` writes into it; None where another tool did not."""
    try:
        return datetime.strptime(fields["issued"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        return None


def _reason(error: Exception, is_refreshed: bool) -> str:
    reasons: list[tuple[type[Exception], str]] = [
        (exceptions.ExpiredMetadataError, "expired"),
        (exceptions.BadVersionNumberError, "rollback"),
        (exceptions.LengthOrHashMismatchError, "checksum" if is_refreshed else "mixed"),
        (exceptions.DownloadLengthMismatchError, "endless"),
        (exceptions.RepositoryError, "signature"),
    ]
    return next((reason for kind, reason in reasons if isinstance(error, kind)), "unreachable")


def _refusal(reason: str, source: str, text: str) -> UpdateRefusedError:
    advice = f"; {_ADVICE[reason]}" if reason in _ADVICE else ""
    return UpdateRefusedError(reason, f"{source}: refused ({reason}): {text}{advice}")


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpdateRefusedError(
            "no-channel", f"channel {channel}: its file is not readable ({error}); publish again"
        ) from error
    if schema != CHANNEL_SCHEMA:
        raise UpdateRefusedError("schema", f"channel {channel}: its schema is {schema!r:.40}; update the agent first")
    if not isinstance(name, str) or not _BUNDLE_NAME.fullmatch(name) or type(release) is not int:
        raise UpdateRefusedError(
            "no-channel", f"channel {channel}: {str(pointer)[:200]} names no bundle; publish again"
        )
    return name, release
