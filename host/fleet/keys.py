"""Signing keys of an update repository: ed25519, one PEM file each, readable by their owner only.

Three root keys of which two must sign, and one key each for targets, snapshot and timestamp. Keep the root keys away from
the machine that publishes: only `root-*.pem` can replace the others.
"""

import os
import shutil
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner

from host.errors import FleetError

ROLES = {
    "root": ("root-1", "root-2", "root-3"),
    "targets": ("targets",),
    "snapshot": ("snapshot",),
    "timestamp": ("timestamp",),
}


def create_keys(directory: Path) -> dict[str, list[CryptoSigner]]:
    """Make and store all keys, all or none; FleetError if the directory holds anything already."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))  # mode 0700
    for name in _names():
        _write_private(partial / f"{name}.pem", CryptoSigner.generate_ed25519().private_bytes)
    try:
        partial.rename(directory)
    except OSError as error:
        shutil.rmtree(partial)
        raise FleetError(f"{directory}: is not empty; name another --keys directory") from error
    return load_keys(directory)


def load_keys(directory: Path) -> dict[str, list[CryptoSigner]]:
    """Load the signers of every role; FleetError names a missing or unusable file."""
    return {role: [_load(directory / f"{name}.pem") for name in names] for role, names in ROLES.items()}


def has_keys(directory: Path) -> bool:
    """Whether any key of ours lies in the directory."""
    return any((directory / f"{name}.pem").exists() for name in _names())


def _names() -> list[str]:
    return [name for names in ROLES.values() for name in names]


def _load(path: Path) -> CryptoSigner:
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), password=None))  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise FleetError(
            f"{path}: signing key is missing; pass the --keys directory that created the repository"
        ) from error
    except (ValueError, TypeError, OSError) as error:
        raise FleetError(
            f"{path}: not a usable private key ({type(error).__name__}); restore it from your backup"
        ) from error


def _write_private(path: Path, pem: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
