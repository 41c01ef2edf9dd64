"""Where the files of a bundle lie in it: a board that holds one of them already need not transfer its bytes again.

`parts/BUNDLE.json`, a signed target beside the bundle:

    {"schema": 1, "bundle_bytes": 1234, "files": [{"start": 60, "bytes": 1000, "sha256": "..."}, ...]}

In the order of their bytes. What lies between them (the zip's headers and directory) is transferred always. The bundle put
together so must have the signed SHA-256, as if it had been transferred whole; this file only says where to look.
"""

import hashlib
import json
from pathlib import Path

from device.contract.errors import ArtifactError
from device.contract.record import record
from device.contract.records import from_table, to_table
from device.contract.zipped import list_members, read_member

PARTS_SCHEMA = 1
MAX_PARTS_BYTES = 4 << 20


@record(frozen=True, slots=True, kw_only=True)
class Part:
    """One file inside a bundle."""

    start: int
    bytes: int
    sha256: str


@record(frozen=True, slots=True, kw_only=True)
class Parts:
    """All files inside a bundle of `bundle_bytes` bytes."""

    bundle_bytes: int
    files: tuple[Part, ...]
    schema: int = PARTS_SCHEMA

    def __post_init__(self) -> None:
        end = 0
        for part in self.files:
            if part.start < end or part.bytes < 0:
                raise ArtifactError(f"parts: the file at byte {part.start} overlaps the one before")
            end = part.start + part.bytes
        if self.schema != PARTS_SCHEMA or end > self.bundle_bytes:
            raise ArtifactError(
                f"parts: schema {self.schema}, files up to byte {end} of {self.bundle_bytes}; publish again"
            )

    def to_json(self) -> bytes:
        return json.dumps(to_table(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Parts":
        """Parse an index; ArtifactError where it is none that this version reads."""
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"parts: not JSON ({error}); publish the bundle again") from error
        return from_table(cls, table, where="parts", error=ArtifactError)


def parts_name(bundle: str) -> str:
    """The name of a bundle's index among the targets."""
    return f"parts/{bundle}.json"


def parts_of(bundle: Path) -> Parts:
    """The index of a bundle; ArtifactError where it has not the shape of one."""
    files = [
        Part(start=member.start, bytes=member.bytes, sha256=hashlib.sha256(read_member(bundle, member)).hexdigest())
        for member in list_members(bundle).values()
    ]
    return Parts(bundle_bytes=bundle.stat().st_size, files=tuple(files))
