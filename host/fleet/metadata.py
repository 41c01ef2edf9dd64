"""The metadata of an update repository: read as a board reads it, signed, and written so that a reader sees old or new.

    DIR/metadata/N.root.json, N.targets.json, N.snapshot.json    never written twice
    DIR/metadata/timestamp.json                                  the one file that is replaced, last, by one rename

All metadata say when they were `issued`, which boards without a clock go by (`device.trusted_time`). Each is issued later than
those before: a host whose clock is behind what it signed once goes on from there.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import StorageError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from device.contract.files import write_atomic
from host.errors import FleetError
from host.fleet.keys import Keys

LIFETIME_DAYS = {"root": 365, "targets": 90, "snapshot": 90, "timestamp": 30}
"""A board refuses to install from older metadata. 30 days for the timestamp, not the usual one or seven: flashed cards wait."""
METADATA = "metadata"
TIMESTAMP = "timestamp.json"
ISSUED = "issued"
ISSUED_FORM = "%Y-%m-%dT%H:%M:%SZ"
_VERSIONED = re.compile(r"(\d+)\.([a-z]+)\.json")


@dataclass(frozen=True, slots=True)
class Current:
    """The metadata that a board which comes now will take."""

    root: Root
    targets: Targets
    snapshot: Snapshot
    timestamp: Timestamp

    def role(self, name: str) -> Signed:
        return getattr(self, name)  # type: ignore[no-any-return]


def read_current(directory: Path) -> Current:
    """Read what the repository says now; needs no key.

    Raises:
        FleetError: the directory is no update repository.
    """
    try:
        timestamp = _read(directory, TIMESTAMP)
        snapshot = _read(directory, f"{timestamp.snapshot_meta.version}.snapshot.json")
        targets = _read(directory, f"{snapshot.meta['targets.json'].version}.targets.json")
        return Current(newest_root(directory), targets, snapshot, timestamp)
    except (StorageError, DeserializationError, ValueError) as error:
        raise FleetError(
            f"{directory}: not a whole update repository ({error}); run 'fieldvit publish init' first"
        ) from error


def newest_root(directory: Path) -> Root:
    """The newest root metadata."""
    return _read(directory, f"{max(_versions(directory, 'root'))}.root.json")  # type: ignore[no-any-return]


def is_repository(directory: Path) -> bool:
    """Whether a repository was made here, to the end."""
    return (directory / METADATA / TIMESTAMP).exists()


class Signing:
    """Writes new metadata with the keys at hand.

    Args:
        directory: the repository.
        keys: any signers; which are needed, the root metadata says.
        roots: what boards go by: the newest root metadata, and, while one takes the place of another, both.
    """

    def __init__(self, directory: Path, keys: Keys, roots: Sequence[Root]) -> None:
        self._directory, self._keys, self._roots = directory, keys, roots

    def require_keys(self, roles: Iterable[str]) -> None:
        """Raise FleetError unless there are keys enough for all these roles."""
        for role in roles:
            self._signers(role)

    def commit(self, targets: Targets) -> None:
        """Write targets, then a snapshot of them, then the timestamp that makes both valid."""
        issued = issue_time(self._directory)
        targets.version = self._next_version("targets")
        written = self._write(_renewed(targets, issued))
        snapshot = Snapshot(meta={"targets.json": MetaFile.from_data(targets.version, written, ["sha256"])})
        self._commit_snapshot(snapshot, issued)

    def renew(self, roles: Iterable[str]) -> list[str]:
        """Sign anew what has not changed: these roles, and those that must outlive them; returns all that were signed."""
        current, issued = read_current(self._directory), issue_time(self._directory)
        end = _renewed(Timestamp(), issued).expires
        asked = {*roles, "timestamp"}
        if "targets" in asked or current.targets.expires <= end:
            self.commit(current.targets)
            return ["targets", "snapshot", "timestamp"]
        if "snapshot" in asked or current.snapshot.expires <= end:
            self._commit_snapshot(current.snapshot, issued)
            return ["snapshot", "timestamp"]
        self._commit_timestamp(current.timestamp.snapshot_meta, issued)
        return ["timestamp"]

    def _commit_snapshot(self, snapshot: Snapshot, issued: datetime) -> None:
        snapshot.version = self._next_version("snapshot")
        written = self._write(_renewed(snapshot, issued))
        self._commit_timestamp(MetaFile.from_data(snapshot.version, written, ["sha256"]), issued)

    def _commit_timestamp(self, snapshot_meta: MetaFile, issued: datetime) -> None:
        version = _read(self._directory, TIMESTAMP).version + 1 if is_repository(self._directory) else 1
        self._write(_renewed(Timestamp(version=version, snapshot_meta=snapshot_meta), issued))

    def _write(self, signed: Signed) -> bytes:
        metadata = Metadata(signed)
        for signer in self._signers(signed.type):
            metadata.sign(signer, append=True)
        content = metadata.to_bytes()
        name = TIMESTAMP if signed.type == "timestamp" else f"{signed.version}.{signed.type}.json"
        write_atomic(self._directory / METADATA / name, content)
        return content

    def _signers(self, role: str) -> list[CryptoSigner]:
        """The signers that satisfy every root at once."""
        found: Keys = {}
        for root in self._roots:
            named = root.roles[role]
            own = {keyid: self._keys[keyid] for keyid in named.keyids if keyid in self._keys}
            if len(own) < named.threshold:
                known = any(keyid in self._keys for keyid in root.keys)
                what = f"the {role} key is missing" if known else f"the {role} key given is not this repository's"
                raise FleetError(f"{self._directory}: {what}; pass its own --keys")
            found |= own
        return list(found.values())

    def _next_version(self, role: str) -> int:
        """Above all that were ever written, also by a call that was cut off: a cache may have seen them."""
        return max(_versions(self._directory, role), default=0) + 1


def issue_time(directory: Path) -> datetime:
    """Now, but later than all that the repository says was issued before."""
    now = datetime.now(UTC).replace(microsecond=0)
    if not is_repository(directory):
        return now
    current = read_current(directory)
    return max(now, *(issued_of(signed) + timedelta(seconds=1) for signed in (current.root, current.timestamp)))


def renewed_root(root: Root, *, version: int, issued: datetime) -> Root:
    """Root metadata as the version that it will be."""
    root.version = version
    return _renewed(root, issued)  # type: ignore[no-any-return]


def issued_of(signed: Signed) -> datetime:
    """When metadata was signed; the beginning of time for those of an earlier version."""
    try:
        return datetime.strptime(signed.unrecognized_fields[ISSUED], ISSUED_FORM).replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        return datetime.fromtimestamp(0, UTC)


def remove_old(directory: Path, *, keep: int) -> list[Path]:
    """Delete targets and snapshots before the `keep` newest versions; root metadata stay, boards follow them one by one."""
    current = read_current(directory)
    removed = []
    for role in ("targets", "snapshot"):
        for version in _versions(directory, role):
            if version <= current.role(role).version - keep:
                path = directory / METADATA / f"{version}.{role}.json"
                path.unlink()
                removed.append(path)
    return removed


def _renewed(signed: Any, issued: datetime) -> Any:
    signed.expires = issued + timedelta(days=LIFETIME_DAYS[signed.type])
    signed.unrecognized_fields[ISSUED] = issued.strftime(ISSUED_FORM)
    return signed


def _versions(directory: Path, role: str) -> list[int]:
    names = (_VERSIONED.fullmatch(path.name) for path in (directory / METADATA).glob(f"*.{role}.json"))
    return sorted(int(found[1]) for found in names if found)


def _read(directory: Path, name: str) -> Any:
    return Metadata.from_file(str(directory / METADATA / name)).signed
