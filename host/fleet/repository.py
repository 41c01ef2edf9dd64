"""The signed update repository: static files after The Update Framework, written with python-tuf.

    DIR/metadata/   N.root.json, N.targets.json, N.snapshot.json, timestamp.json
    DIR/targets/    SHA256.NAME-VERSION.fieldvit, channels/SHA256.CHANNEL.json, parts/SHA256.NAME-VERSION.fieldvit.json

A channel file names the bundle and its release number, so a board follows a channel and never a file name. A parts file
says where which files lie in a bundle, so that a board transfers only those it does not hold. Each change writes targets,
then metadata, and `timestamp.json` last, in one rename: a reader, or a crash, leaves the old state or the new.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import TargetFile, Targets

from device.contract.bundle import read_manifest
from device.contract.errors import ArtifactError
from device.contract.files import write_atomic
from device.contract.manifest import Manifest
from device.contract.parts import parts_name, parts_of
from device.contract.topics import is_id
from host.errors import FleetError
from host.fleet.keys import (
    ONLINE_ROLES,
    ROLES,
    ROOT_KEYS,
    ROOT_THRESHOLD,
    Keys,
    by_id,
    create_keys,
    has_keys,
    load_keys,
)
from host.fleet.metadata import METADATA, Signing, is_repository, issue_time, read_current, remove_old
from host.fleet.root import first_root

CHANNEL_SCHEMA = 1
KEEP_METADATA = 10
_SUFFIX = ".fieldvit"
_CHANNELS = "channels/"


class UpdateRepository:
    """An update repository on disk, with the online keys that sign it."""

    def __init__(self, directory: Path, keys: Keys) -> None:
        self.directory = directory
        self.keys = keys

    @classmethod
    def open_or_create(
        cls, directory: Path, keys_directory: Path, *, passphrase: bytes | None = None
    ) -> "UpdateRepository":
        """Open a repository with its keys, or make both when neither is there.

        Raises:
            FleetError: one of the two is missing, or the keys are not the repository's.
        """
        if is_repository(directory):
            return cls.open(directory, [keys_directory], passphrase=passphrase)
        return cls.create(directory, keys_directory, passphrase=passphrase)

    @classmethod
    def open(
        cls,
        directory: Path,
        keys: Sequence[Path],
        *,
        roles: Sequence[str] = ONLINE_ROLES,
        passphrase: bytes | None = None,
    ) -> "UpdateRepository":
        """Open a repository.

        Args:
            directory: the repository.
            keys: files of keys, and directories of them.
            roles: whose keys must be among them.
            passphrase: of encrypted keys.

        Raises:
            FleetError: there is no repository, or the keys are not its own.
        """
        repository = cls(directory, by_id(load_keys(keys, passphrase=passphrase)))
        repository._signing().require_keys(roles)
        return repository

    @classmethod
    def create(
        cls,
        directory: Path,
        keys_directory: Path,
        *,
        root_directory: Path | None = None,
        root_keys: int = ROOT_KEYS,
        root_threshold: int = ROOT_THRESHOLD,
        passphrase: bytes | None = None,
    ) -> "UpdateRepository":
        """Make an empty repository; with new keys, or with those an interrupted call has made.

        Raises:
            FleetError: it is there already, or the keys' directory holds something else.
        """
        if is_repository(directory):
            raise FleetError(f"{directory}: is an update repository already; name another --repo")
        if not 1 <= root_threshold <= root_keys:
            raise FleetError(f"--root-threshold {root_threshold}: must be 1 to {root_keys}, the number of root keys")
        if has_keys(keys_directory):
            roles, keys = _own_keys(keys_directory, root_directory, root_threshold, passphrase)
        else:
            made = create_keys(
                keys_directory, root_keys=root_keys, root_directory=root_directory, passphrase=passphrase
            )
            roles = {role: [signer.public_key.keyid for signer in signers] for role, signers in made.items()}
            keys = {signer.public_key.keyid: signer for signers in made.values() for signer in signers}
        root = first_root(roles, keys, threshold=root_threshold, issued=issue_time(directory))
        write_atomic(directory / METADATA / "1.root.json", root.to_bytes())
        (directory / "targets" / "channels").mkdir(parents=True, exist_ok=True)
        Signing(directory, keys, [root.signed]).commit(Targets())
        return cls(directory, keys)

    @property
    def root_bytes(self) -> bytes:
        """The first root metadata: what a board must be given, once, over a trusted way."""
        return (self.directory / METADATA / "1.root.json").read_bytes()

    def publish(self, bundle: Path, channel: str) -> Manifest:
        """Sign a bundle and point a channel at it.

        Raises:
            FleetError: the channel name is wrong, or the channel already has this release or a newer one.
            ArtifactError: the file is no bundle.
        """
        _require_channel_name(channel)
        manifest = read_manifest(bundle)
        with self.locked():
            targets = read_current(self.directory).targets
            current = self.release_of(channel)
            if current is not None and manifest.release <= current:
                raise FleetError(
                    f"channel {channel}: has release {current}, the bundle is release {manifest.release}; "
                    "boards refuse to go back, so raise 'release' in the recipe and export again"
                )
            name = target_name(manifest)
            content = bundle.read_bytes()
            existing = targets.targets.get(name)
            if existing and existing.hashes["sha256"] != _target(name, content).hashes["sha256"]:
                raise FleetError(f"{name}: is already published with other content; raise 'version' in the recipe")
            pointer = {"schema": CHANNEL_SCHEMA, "bundle": name, "release": manifest.release}
            self._add_target(targets, name, content)
            if parts := _parts_json(bundle):
                self._add_target(targets, parts_name(name), parts)
            self._add_target(targets, f"{_CHANNELS}{channel}.json", json.dumps(pointer, sort_keys=True).encode())
            self._signing().commit(targets)
        return manifest

    def renew(self, roles: Sequence[str]) -> list[str]:
        """Sign online roles anew, for another lifetime; returns those that were, with what must outlive them."""
        with self.locked():
            return self._signing().renew(roles)

    def prune(self, *, keep: int, dry_run: bool = False) -> list[str]:
        """Remove bundles that no channel points at, but for the `keep` newest releases of each name.

        Args:
            keep: how many to leave beside those that channels point at.
            dry_run: only say which.

        Returns:
            The names of the bundles.
        """
        with self.locked():
            targets = read_current(self.directory).targets
            gone = self._superfluous(targets, keep)
            if dry_run:
                return gone
            for name in gone:
                del targets.targets[name]
                targets.targets.pop(parts_name(name), None)
            if gone:
                self._signing().commit(targets)
            self._remove_unsigned_files(targets)
            remove_old(self.directory, keep=KEEP_METADATA)
        return gone

    def release_of(self, channel: str) -> int | None:
        """The release a channel points at, or None."""
        offer = channel_offer(self.directory, channel)
        return offer.release if offer else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the repository meanwhile; a second call waits."""
        with (self.directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _signing(self) -> Signing:
        return Signing(self.directory, self.keys, [read_current(self.directory).root])

    def _add_target(self, targets: Targets, name: str, content: bytes) -> None:
        target = targets.targets[name] = _target(name, content)
        path = self.directory / target_path(name, target.hashes["sha256"])
        if not path.exists():  # named by its hash, and written whole or not at all
            write_atomic(path, content)

    def _superfluous(self, targets: Targets, keep: int) -> list[str]:
        pointed = {
            offer.bundle for channel in channels(self.directory) if (offer := channel_offer(self.directory, channel))
        }
        by_name: dict[str, list[tuple[int, str]]] = {}
        for name, target in targets.targets.items():
            if name.endswith(_SUFFIX) and name not in pointed:
                manifest = read_manifest(self.directory / target_path(name, target.hashes["sha256"]))
                by_name.setdefault(manifest.name, []).append((manifest.release, name))
        return sorted(name for found in by_name.values() for _, name in sorted(found, reverse=True)[keep:])

    def _remove_unsigned_files(self, targets: Targets) -> None:
        """Delete targets that nobody can ask for: pruned ones, and what a publication that was cut off has left."""
        signed = {self.directory / target_path(name, file.hashes["sha256"]) for name, file in targets.targets.items()}
        for path in (self.directory / "targets").rglob("*"):
            if path.is_file() and path not in signed:
                path.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOffer:
    """What a channel points at, the files of it (relative to the repository), and until when boards install it."""

    bundle: str
    release: int
    files: tuple[Path, ...]
    expires: datetime


def publish_bundle(
    bundle: Path, channel: str, *, directory: Path, keys: Path, passphrase: bytes | None = None
) -> Manifest:
    """Check what can be checked, then open or make the repository with its keys, and publish."""
    _require_channel_name(channel)
    read_manifest(bundle)
    return UpdateRepository.open_or_create(directory, keys, passphrase=passphrase).publish(bundle, channel)


def channels(directory: Path) -> list[str]:
    """The channels of a repository; needs no key."""
    names = read_current(directory).targets.targets
    return sorted(name.removeprefix(_CHANNELS).removesuffix(".json") for name in names if name.startswith(_CHANNELS))


def channel_offer(directory: Path, channel: str) -> ChannelOffer | None:
    """What a channel offers, or None if there is no such channel; needs no key.

    Raises:
        FleetError: the directory is no update repository.
    """
    current = read_current(directory)
    targets = current.targets.targets
    name = f"{_CHANNELS}{channel}.json"
    if name not in targets:
        return None
    pointer = target_path(name, targets[name].hashes["sha256"])
    table = json.loads((directory / pointer).read_bytes())
    bundle = target_path(table["bundle"], targets[table["bundle"]].hashes["sha256"])
    return ChannelOffer(
        bundle=table["bundle"],
        release=table["release"],
        files=(pointer, bundle),
        expires=min(current.role(role).expires for role in ROLES),
    )


def target_name(manifest: Manifest) -> str:
    """The name of a bundle among the targets."""
    return f"{manifest.name}-{manifest.version}{_SUFFIX}"


def target_path(name: str, digest: str) -> Path:
    """Where a target lies, relative to the repository."""
    folder, _, base = name.rpartition("/")
    return Path("targets") / folder / f"{digest}.{base}"


def published_digest(directory: Path, name: str) -> str | None:
    """SHA-256 of a published target, or None; needs no key.

    Raises:
        FleetError: the directory is no update repository.
    """
    target = read_current(directory).targets.targets.get(name)
    return target.hashes["sha256"] if target else None


def _own_keys(
    directory: Path, root_directory: Path | None, root_threshold: int, passphrase: bytes | None
) -> tuple[dict[str, list[str]], Keys]:
    """The key ids of every role, by the names of the files that an interrupted creation has made, and the keys."""
    places = [directory, *([root_directory] if root_directory and has_keys(root_directory) else [])]
    found = load_keys(places, passphrase=passphrase)
    roles = {role: [s.public_key.keyid for path, s in found.items() if path.stem.startswith(role)] for role in ROLES}
    if not all(roles.values()) or len(roles["root"]) < root_threshold:
        raise FleetError(f"{directory}: lacks some of the keys of a repository; name another --keys directory")
    return roles, by_id(found)


def _target(name: str, content: bytes) -> TargetFile:
    return TargetFile.from_data(name, content, ["sha256"])


def _parts_json(bundle: Path) -> bytes | None:
    """The index of a bundle; None for one that is no plain zip, which no board takes anyway."""
    try:
        return parts_of(bundle).to_json()
    except ArtifactError:
        return None


def _require_channel_name(channel: str) -> None:
    if not is_id(channel):
        raise FleetError(f"channel {channel!r}: use letters, digits, '_' and '-' only")
