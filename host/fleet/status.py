"""What of an update repository runs out when, and which keys sign it."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from host.fleet.keys import ROLES
from host.fleet.metadata import read_current


class RoleRow(NamedTuple):
    """One role of a repository."""

    role: str
    version: int
    expires: str
    days_left: int
    signatures: str
    keys: str


COLUMNS = RoleRow._fields


def role_rows(directory: Path, *, now: datetime) -> list[RoleRow]:
    """One row for every role, as the repository stands."""
    current = read_current(directory)
    rows = []
    for role in ROLES:
        signed, named = current.role(role), current.root.roles[role]
        rows.append(
            RoleRow(
                role=role,
                version=signed.version,
                expires=f"{signed.expires:%Y-%m-%d}",
                days_left=(signed.expires - now).days,
                signatures=f"{named.threshold} of {len(named.keyids)}",
                keys=" ".join(keyid[:8] for keyid in named.keyids),
            )
        )
    return rows


def ends_within(directory: Path, days: int, *, now: datetime) -> list[str]:
    """The roles whose metadata ends before so many days are over."""
    current = read_current(directory)
    return [role for role in ROLES if current.role(role).expires <= now + timedelta(days=days)]
