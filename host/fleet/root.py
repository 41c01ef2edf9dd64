"""A new root version: it says which keys sign what, and is signed by keys that are never on the publishing machine.

    DIR/pending-root.json     the next root metadata with the signatures it has so far; no board looks at it

Enough keys of the old root and enough of the new one must sign. They come one by one, on sticks, in several calls. When
they are complete, all other metadata is signed by the old keys and the new ones, and only then the root metadata appears:
whichever of the two a board knows at any moment, the repository is whole for it.
"""

import copy
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from tuf.api.exceptions import StorageError
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization import DeserializationError

from device.contract.files import write_atomic
from host.errors import FleetError
from host.fleet.keys import ONLINE_ROLES, Keys
from host.fleet.metadata import METADATA, Signing, issue_time, newest_root, read_current, renewed_root

PENDING = "pending-root.json"


class RootChange:
    """The root metadata in the making, if there is any."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / PENDING
        self._directory = directory
        self.old = newest_root(directory)
        self._metadata = self._load()

    @property
    def new(self) -> Root | None:
        """What the next root metadata will say."""
        return self._metadata.signed if self._metadata else None

    def begin(self) -> Root:
        """What the next root metadata will say so far; change it, then `propose` it."""
        return copy.deepcopy(self.new or self.old)  # `from_dict(to_dict())` would share its lists

    def propose(self, root: Root) -> None:
        """Store new root metadata, without any signature yet."""
        self._metadata = Metadata(renewed_root(root, version=self.old.version + 1, issued=issue_time(self._directory)))
        self._store()

    def sign(self, keys: Keys) -> list[str]:
        """Add the signatures of those keys that count; returns their ids."""
        if self._metadata is None:
            return []
        counted = {*self.old.roles["root"].keyids, *self._metadata.signed.roles["root"].keyids}
        added = [keyid for keyid in keys if keyid in counted and keyid not in self._metadata.signatures]
        for keyid in added:
            self._metadata.sign(keys[keyid], append=True)
        if added:
            self._store()
        return added

    def missing(self) -> list[str]:
        """What is still to be signed, one line for the old keys and one for the new."""
        if self._metadata is None:
            return []
        lines = []
        for whose, root in (("present", self.old), ("new", self._metadata.signed)):
            role = root.roles["root"]
            has = sum(keyid in self._metadata.signatures for keyid in role.keyids)
            if has < role.threshold:
                waiting = ", ".join(keyid[:8] for keyid in role.keyids if keyid not in self._metadata.signatures)
                lines.append(f"{has} of {role.threshold} signatures of the {whose} root keys; others are {waiting}")
        return lines

    def activate(self, keys: Keys) -> Root:
        """Make complete root metadata valid; FleetError where an online key is missing for it."""
        if self._metadata is None or self.missing():
            raise FleetError(f"{self._directory}: the new root metadata lacks {'; '.join(self.missing())}")
        new = self._metadata.signed
        content = self._metadata.to_bytes()
        if any(new.roles[role].keyids != self.old.roles[role].keyids for role in ONLINE_ROLES):
            Signing(self._directory, keys, [self.old, new]).commit(read_current(self._directory).targets)
        write_atomic(self._directory / METADATA / f"{new.version}.root.json", content)
        self._path.unlink()
        self._metadata, self.old = None, new
        return new

    def cancel(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)
        self._metadata = None

    def _load(self) -> Metadata[Root] | None:
        try:
            metadata = Metadata[Root].from_bytes(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (StorageError, DeserializationError) as error:
            raise FleetError(f"{self._path}: is damaged ({error}); delete it and rotate again") from error
        if metadata.signed.version <= self.old.version:  # was cut off between its last two steps
            self._path.unlink()
            return None
        return metadata

    def _store(self) -> None:
        assert self._metadata is not None
        write_atomic(self._path, self._metadata.to_bytes())


def first_root(signers: Mapping[str, Sequence[str]], keys: Keys, *, threshold: int, issued: datetime) -> Metadata[Root]:
    """The root metadata that a repository begins with.

    Args:
        signers: the key ids of every role.
        keys: all of them.
        threshold: how many root keys must sign.
        issued: now.
    """
    root = Root()
    for role, keyids in signers.items():
        for keyid in keyids:
            root.add_key(keys[keyid].public_key, role)
    root.roles["root"].threshold = threshold
    metadata = Metadata(renewed_root(root, version=1, issued=issued))
    for keyid in signers["root"][:threshold]:
        metadata.sign(keys[keyid], append=True)
    return metadata
