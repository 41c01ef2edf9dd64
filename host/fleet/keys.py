"""Signing keys of an update repository: ed25519, one PEM file each, readable by their owner only.

    KEYS/root-1.pem ...   only together, as many as the threshold says, can they replace any other key: keep them off line
    KEYS/targets.pem, snapshot.pem, timestamp.pem     needed to publish

A key is known by its content, not by its file's name: which role it has stands in the repository's root metadata. With a
passphrase the files are encrypted (PKCS #8, as OpenSSL reads it).
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner

from device.contract.files import sync_directory
from host.errors import FleetError

ONLINE_ROLES = ("targets", "snapshot", "timestamp")
ROLES = ("root", *ONLINE_ROLES)
ROOT_KEYS, ROOT_THRESHOLD = 3, 2

Keys = dict[str, CryptoSigner]
"""Signers by key id."""


def create_keys(
    directory: Path, *, root_keys: int = ROOT_KEYS, root_directory: Path | None = None, passphrase: bytes | None = None
) -> dict[str, list[CryptoSigner]]:
    """Make and store the keys of all roles, in each directory all or none.

    Args:
        directory: of the online keys.
        root_keys: how many root keys.
        root_directory: of the root keys, if not the same.
        passphrase: encrypts the files.

    Raises:
        FleetError: a directory holds something already.
    """
    root_names = [f"root-{number}" for number in range(1, root_keys + 1)]
    places = {directory: list(ONLINE_ROLES)}
    places[root_directory or directory] = [*places.get(root_directory or directory, []), *root_names]
    for place in places:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise FleetError(f"{place}: is not empty; name another directory for the new keys")
    keys = {name: Ed25519PrivateKey.generate() for names in places.values() for name in names}
    for place, names in places.items():
        _write_directory(place, {f"{name}.pem": _pem(keys[name], passphrase) for name in names})
    signers = {name: CryptoSigner(key) for name, key in keys.items()}
    return {"root": [signers[name] for name in root_names], **{role: [signers[role]] for role in ONLINE_ROLES}}


def add_key(directory: Path, role: str, *, passphrase: bytes | None = None) -> tuple[Path, CryptoSigner]:
    """Make one more key of a role, as `ROLE-N.pem`; returns its file and signer."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    pattern = re.compile(rf"{role}-(\d+)\.pem")
    taken = [int(found[1]) for path in directory.iterdir() if (found := pattern.fullmatch(path.name))]
    path = directory / f"{role}-{max([1, *taken]) + 1}.pem"
    key = Ed25519PrivateKey.generate()
    _write_private(path, _pem(key, passphrase))
    sync_directory(directory)
    return path, CryptoSigner(key)


def load_keys(places: Iterable[Path], *, passphrase: bytes | None = None) -> dict[Path, CryptoSigner]:
    """The signers in files, and in directories of `*.pem` files, by file.

    Raises:
        FleetError: names a file that is missing, unusable, or encrypted with another passphrase.
    """
    paths = [path for place in places for path in (sorted(place.glob("*.pem")) if place.is_dir() else [place])]
    return {path: _load(path, passphrase) for path in paths}


def by_id(signers: Mapping[Path, CryptoSigner]) -> Keys:
    """The same signers by key id."""
    return {signer.public_key.keyid: signer for signer in signers.values()}


def has_keys(directory: Path) -> bool:
    """Whether any key lies in the directory."""
    return any(directory.glob("*.pem"))


def _load(path: Path, passphrase: bytes | None) -> CryptoSigner:
    try:
        content = path.read_bytes()
        is_encrypted = b"ENCRYPTED" in content
        if is_encrypted and not passphrase:
            raise FleetError(f"{path}: is encrypted; set FIELDVIT_KEY_PASSPHRASE, or pass --passphrase-file")
        key = load_pem_private_key(content, password=passphrase if is_encrypted else None)
        return CryptoSigner(key)  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise FleetError(
            f"{path}: no such signing key; pass the --keys directory that created the repository"
        ) from error
    except (ValueError, TypeError, OSError) as error:
        raise FleetError(
            f"{path}: not a usable private key, or another passphrase ({type(error).__name__}); restore it from your backup"
        ) from error


def _pem(key: Ed25519PrivateKey, passphrase: bytes | None) -> bytes:
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def _write_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write private files; the directory appears with all of them, by one rename."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))  # mode 0700
    for name, content in files.items():
        _write_private(partial / name, content)
    try:
        sync_directory(partial)
        partial.rename(directory)
    except OSError as error:
        shutil.rmtree(partial)
        raise FleetError(f"{directory}: is not empty; name another directory for the new keys") from error
    sync_directory(directory.parent)


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
