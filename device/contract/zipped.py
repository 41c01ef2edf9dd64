"""The shape of a bundle's zip: stored members one after the other, and a directory at the end that says the same of them.

`zipfile` is made for every zip there is, and forgives: bytes before, between and behind the members, two members of one
name, a directory that disagrees with the headers in front of the members. What two readers can read differently must not
be signed for, so a bundle has one shape only, which `converters.bundle` writes and this module insists on.
"""

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from device.contract.errors import ArtifactError
from device.contract.record import record

_END = struct.Struct("<4s4H2LH")
_LOCAL = struct.Struct("<4s5H3L2H")
_UTF8_NAME = 0x800
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    MemoryError,
)
"""What `zipfile` raises on a damaged file; a flipped bit may claim encryption, compression or bytes beyond the end."""


@record(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of a bundle, and where its bytes lie."""

    name: str
    start: int
    bytes: int
    crc: int


def list_members(bundle: Path) -> dict[str, Member]:
    """The members of a bundle by name, in the order of their bytes.

    Raises:
        ArtifactError: the file is missing, or has not the one shape a bundle may have.
    """
    try:
        with bundle.open("rb") as file:
            return _members(file, bundle)
    except FileNotFoundError as error:
        raise ArtifactError(f"{bundle}: no such bundle; build one with 'fieldvit export'") from error
    except _DAMAGE as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{bundle}: not a bundle ({error}); build it again with 'fieldvit export'") from error


def read_member(bundle: Path, member: Member) -> bytes:
    """The content of one member; ArtifactError where bits of it have changed."""
    with bundle.open("rb") as file:
        file.seek(member.start)
        content = file.read(member.bytes)
    if len(content) != member.bytes or zlib.crc32(content) != member.crc:
        raise ArtifactError(f"{member.name}: damaged, it is cut off or its CRC is wrong; copy the bundle again")
    return content


def _members(file: BinaryIO, bundle: Path) -> dict[str, Member]:
    start_of_directory = _require_plain_end(file, bundle)
    members: dict[str, Member] = {}
    offset = 0
    with zipfile.ZipFile(file) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.filename in members:
                raise ArtifactError(f"{bundle}: two files are named {info.filename!r}; build the bundle again")
            if info.header_offset != offset:
                raise ArtifactError(f"{bundle}: {info.filename!r} does not follow on the file before; build it again")
            start = offset + _require_plain_member(file, info, bundle)
            members[info.filename] = Member(name=info.filename, start=start, bytes=info.file_size, crc=info.CRC)
            offset = start + info.file_size
    if offset != start_of_directory:
        raise ArtifactError(f"{bundle}: has {start_of_directory - offset} bytes that belong to no file; build it again")
    return members


def _require_plain_end(file: BinaryIO, bundle: Path) -> int:
    """Check the last record, before `zipfile` believes it; returns where the directory starts."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END.size, 0))
    magic, disk, first_disk, here, total, directory_bytes, start, comment = _END.unpack(file.read())
    if (
        magic != b"PK\5\6"
        or disk
        or first_disk
        or here != total
        or comment
        or start + directory_bytes + _END.size != size
    ):
        raise ArtifactError(
            f"{bundle}: not a bundle, or cut off (its end is not that of a plain zip); name a NAME-VERSION.fieldvit"
        )
    return int(start)


def _require_plain_member(file: BinaryIO, info: zipfile.ZipInfo, bundle: Path) -> int:
    """Compare a member's own header with the directory's record of it; returns the header's length."""
    file.seek(info.header_offset)
    magic, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = _LOCAL.unpack(file.read(_LOCAL.size))
    name = file.read(name_bytes)
    own = (magic, flags, method, crc, packed, size, name, extra_bytes)
    listed_name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8_NAME else "cp437")
    listed = (b"PK\3\4", info.flag_bits, zipfile.ZIP_STORED, info.CRC, info.file_size, info.file_size, listed_name, 0)
    kind = stat.S_IFMT(info.external_attr >> 16)
    is_plain = info.flag_bits & ~_UTF8_NAME == 0 and info.compress_size == info.file_size and not info.extra
    if own != listed or not is_plain or info.comment or kind not in (0, stat.S_IFREG):
        raise ArtifactError(
            f"{bundle}: {info.filename!r} is compressed, encrypted, linked, or its two headers disagree; build it again"
        )
    return _LOCAL.size + int(name_bytes)
