"""The signed update repository: static files after The Update Framework, written with python-tuf.

    DIR/metadata/   N.root.json, N.targets.json, N.snapshot.json, timestamp.json
    DIR/targets/    SHA256.NAME-VERSION.fieldvit, channels/SHA256.CHANNEL.json

A channel file names the bundle and its release number, so a board follows a channel and never a file name. Each
publication writes targets, then metadata, and `timestamp.json` last, in one rename: a reader sees the old state or the new.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import StorageError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from device.contract.bundle import read_manifest
from device.contract.files import write_atomic
from device.contract.manifest import Manifest
from device.contract.topics import is_id
from host.errors import FleetError
from host.fleet.keys import create_keys, has_keys, load_keys

LIFETIME_DAYS = {"root": 365, "targets": 90, "snapshot": 90, "timestamp": 30}
"""A board refuses to install from older metadata. 30 days for the timestamp, not the usual one or seven: flashed cards wait."""
CHANNEL_SCHEMA = 1


class UpdateRepository:
    """An update repository on disk, with the keys that sign it."""

    def __init__(self, directory: Path, keys: dict[str, list[CryptoSigner]]) -> None:
        self.directory = directory
        self._keys = keys

    @classmethod
    def open_or_create(cls, directory: Path, keys_directory: Path) -> "UpdateRepository":
        """Open a repository with its keys, or make both when neither is there.

        Raises:
            FleetError: one of the two is missing, or the keys are not the repository's.
        """
        if not (directory / "metadata" / "timestamp.json").exists():
            if has_keys(keys_directory):
                return cls._create(directory, load_keys(keys_directory))
            return cls._create(directory, create_keys(keys_directory))
        repository = cls(directory, load_keys(keys_directory))
        repository._require_own_keys()
        return repository

    @property
    def root_bytes(self) -> bytes:
        """The first root metadata: what a board must be given, once, over a trusted way."""
        return (self.directory / "metadata" / "1.root.json").read_bytes()

    def publish(self, bundle: Path, channel: str) -> Manifest:
        """Sign a bundle and point a channel at it.

        Raises:
            FleetError: the channel name is wrong, or the channel already has this release or a newer one.
            ArtifactError: the file is no bundle.
        """
        _require_channel_name(channel)
        manifest = read_manifest(bundle)
        targets = _targets(self.directory)
        current = self.release_of(channel)
        if current is not None and manifest.release <= current:
            raise FleetError(
                f"channel {channel}: has release {current}, the bundle is release {manifest.release}; "
                "boards refuse to go back, so raise 'release' in the recipe and export again"
            )
        name = target_name(manifest)
        content = bundle.read_bytes()
        existing = targets.targets.get(name)
        if existing and existing.hashes["sha256"] != TargetFile.from_data(name, content, ["sha256"]).hashes["sha256"]:
            raise FleetError(f"{name}: is already published with other content; raise 'version' in the recipe")
        targets.version += 1
        pointer = {"schema": CHANNEL_SCHEMA, "bundle": name, "release": manifest.release}
        self._add_target(targets, name, content)
        self._add_target(targets, f"channels/{channel}.json", json.dumps(pointer, sort_keys=True).encode())
        self._commit(targets)
        return manifest

    def release_of(self, channel: str) -> int | None:
        """The release a channel points at, or None."""
        offer = channel_offer(self.directory, channel)
        return offer.release if offer else None

    @classmethod
    def _create(cls, directory: Path, keys: dict[str, list[CryptoSigner]]) -> "UpdateRepository":
        repository = cls(directory, keys)
        root = Root(expires=_expires("root"))
        for role, signers in keys.items():
            for signer in signers:
                root.add_key(signer.public_key, role)
        root.roles["root"].threshold = 2
        (directory / "targets" / "channels").mkdir(parents=True, exist_ok=True)
        (directory / "metadata").mkdir(parents=True, exist_ok=True)
        repository._sign(root, "1.root.json", signers=keys["root"][:2])
        repository._commit(Targets(version=1))
        return repository

    def _require_own_keys(self) -> None:
        root = Metadata[Root].from_bytes(self.root_bytes).signed
        for role, signers in self._keys.items():
            if any(signer.public_key.keyid not in root.roles[role].keyids for signer in signers):
                raise FleetError(
                    f"{self.directory}: the {role} key given is not this repository's; pass its own --keys"
                )

    def _add_target(self, targets: Targets, name: str, content: bytes) -> None:
        target = targets.targets[name] = TargetFile.from_data(name, content, ["sha256"])
        path = self.directory / target_path(name, target.hashes["sha256"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)

    def _commit(self, targets: Targets) -> None:
        version = targets.version
        targets.expires = _expires("targets")
        snapshot = Snapshot(version=version, expires=_expires("snapshot"), meta={"targets.json": MetaFile(version)})
        timestamp = Timestamp(version=version, expires=_expires("timestamp"), snapshot_meta=MetaFile(version))
        self._sign(targets, f"{version}.targets.json")
        self._sign(snapshot, f"{version}.snapshot.json")
        self._sign(timestamp, "timestamp.json")

    def _sign(self, signed: Signed, file_name: str, signers: list[CryptoSigner] | None = None) -> None:
        metadata = Metadata(signed)
        for signer in signers or self._keys[signed.type]:
            metadata.sign(signer, append=True)
        write_atomic(self.directory / "metadata" / file_name, metadata.to_bytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOffer:
    """What a channel points at, the files of it (relative to the repository), and until when boards install it."""

    bundle: str
    release: int
    files: tuple[Path, ...]
    expires: datetime


def publish_bundle(bundle: Path, channel: str, *, directory: Path, keys: Path) -> Manifest:
    """Check what can be checked, then open or make the repository with its keys, and publish."""
    _require_channel_name(channel)
    read_manifest(bundle)
    return UpdateRepository.open_or_create(directory, keys).publish(bundle, channel)


def channel_offer(directory: Path, channel: str) -> ChannelOffer | None:
    """What a channel offers, or None if there is no such channel; needs no key.

    Raises:
        FleetError: the directory is no update repository.
    """
    targets = _targets(directory).targets
    name = f"channels/{channel}.json"
    if name not in targets:
        return None
    pointer = target_path(name, targets[name].hashes["sha256"])
    table = json.loads((directory / pointer).read_bytes())
    bundle = target_path(table["bundle"], targets[table["bundle"]].hashes["sha256"])
    expires = Metadata[Timestamp].from_file(str(directory / "metadata" / "timestamp.json")).signed.expires
    return ChannelOffer(bundle=table["bundle"], release=table["release"], files=(pointer, bundle), expires=expires)


def target_name(manifest: Manifest) -> str:
    """The name of a bundle among the targets."""
    return f"{manifest.name}-{manifest.version}.fieldvit"


def target_path(name: str, digest: str) -> Path:
    """Where a target lies, relative to the repository."""
    folder, _, base = name.rpartition("/")
    return Path("targets") / folder / f"{digest}.{base}"


def published_digest(directory: Path, name: str) -> str | None:
    """SHA-256 of a published target, or None; needs no key.

    Raises:
        FleetError: the directory is no update repository.
    """
    target = _targets(directory).targets.get(name)
    return target.hashes["sha256"] if target else None


def _targets(directory: Path) -> Targets:
    """The newest targets metadata, found as a board finds it: from the timestamp over the snapshot."""

    def read(file_name: str) -> Any:
        return Metadata.from_file(str(directory / "metadata" / file_name)).signed

    try:
        snapshot = read(f"{read('timestamp.json').snapshot_meta.version}.snapshot.json")
        return read(f"{snapshot.meta['targets.json'].version}.targets.json")
    except (StorageError, DeserializationError) as error:
        raise FleetError(
            f"{directory}: not a whole update repository ({error}); run 'fieldvit publish' first"
        ) from error


def _require_channel_name(channel: str) -> None:
    if not is_id(channel):
        raise FleetError(f"channel {channel!r}: use letters, digits, '_' and '-' only")


def _expires(role: str) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=LIFETIME_DAYS[role])
