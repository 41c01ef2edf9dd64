"""What a process wrote to a directory, and every content that the directory may have after the power went.

`strace` records the real agent, all threads, SQLite's own writes included: each write, rename, create, unlink, fsync with its
bytes. A *crash state* is then what the disk may hold if the power goes after the first n of these calls:

- An `fsync` of a file makes the writes to it durable that had returned before it began, one of a directory the names in it;
  only that. (ext4 promises more; the agent must not need it. A new file's name needs its directory's fsync.)
- What was not synced is there, or is lost, independently and out of order, except that two changes of one name keep their
  order. A write that was not synced may also be torn (a part of its bytes from the start), or have grown the file by zeros.
- A rename is whole or not at all.

The style is that of ALICE (Pillai et al., OSDI 2014). Not modelled: a disk that lies about fsync, bit rot, sectors that are
torn by the very write they are in the middle of (`damaged` content beside the write), permissions, and memory-mapped
writes: SQLite maps its `-shm` file, which it makes anew after a crash, and the agent maps nothing that it writes.
"""

import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from host.errors import BenchError

_TRACED = (
    "openat,creat,write,pwrite64,writev,pwritev,lseek,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,"
    "mkdirat,rmdir,symlink,symlinkat,ftruncate,truncate,sendto,link,linkat,fallocate,sendfile,copy_file_range"
)
_NOT_MODELLED = ("creat", "writev", "pwritev", "truncate", "link", "linkat", "fallocate", "sendfile", "copy_file_range")
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)(.*)$")
_BEGUN = re.compile(r"^(\d+) +(\w+\(.*?),? <unfinished \.\.\.>$")
_ENDED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>,? ?(.*)$")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"^(\d+|AT_FDCWD)?<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Bytes into a file, known by its number."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncate:
    inode: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A change of names: create (with `inode`), mkdir, symlink (with `target`), unlink, rmdir, or rename (to `target`)."""

    kind: str
    path: str
    inode: int = 0
    target: str = ""

    @property
    def touches(self) -> set[str]:
        return {self.path, self.target} if self.kind == "rename" else {self.path}

    @property
    def directory(self) -> str:
        return self.path.rpartition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """Makes durable what stands before position `upto`: of a file, or of the names in a directory."""

    upto: int
    inode: int = 0
    directory: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Bytes that left by a socket: from here on somebody may rely on what they say."""

    data: bytes


Operation = Write | Truncate | Name | Sync | Sent


@dataclass(slots=True)
class Files:
    """Content of a directory: files by number, and names (relative paths) of files, directories (None) and links."""

    contents: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int | str | None] = field(default_factory=dict)

    def copy(self) -> "Files":
        return Files({inode: bytearray(data) for inode, data in self.contents.items()}, dict(self.names))

    def write_to(self, directory: Path) -> None:
        """Make a real directory of it."""
        for path, what in sorted(self.names.items()):
            target = directory / path
            if what is None:
                target.mkdir(parents=True, exist_ok=True)
            elif target.parent.is_dir():  # else its directory did not survive
                target.symlink_to(what) if isinstance(what, str) else target.write_bytes(self.contents[what])


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLog:
    """A directory as it was, and what happened to it.

    `durable_at` says for each operation at which position a sync made it durable; never: the length.
    """

    before: Files
    operations: Sequence[Operation]
    durable_at: Sequence[int]


def trace_command(log: Path, command: Sequence[str]) -> list[str]:
    """The command under strace, writing `log`."""
    program = shutil.which("strace")
    if program is None:
        raise BenchError("strace is not installed; install it (Debian/Ubuntu: apt install strace)")
    options = [
        "-f",
        "-xx",
        "-y",
        "-s",
        "99999999",
        "--seccomp-bpf",
        "-qq",
        "-e",
        f"trace={_TRACED}",
        "-e",
        "signal=none",
    ]
    return [program, *options, "-o", str(log), *command]


def can_trace() -> bool:
    """Whether strace is here and may trace."""
    program = shutil.which("strace")
    return (
        program is not None and subprocess.run([program, "-qq", "-o", "/dev/null", "true"], check=False).returncode == 0
    )


def snapshot(root: Path) -> Files:
    """A directory's content, all of it durable."""
    files = Files()
    for number, path in enumerate(sorted(root.rglob("*")), start=1):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            files.names[name] = str(path.readlink())
        elif path.is_dir():
            files.names[name] = None
        else:
            files.names[name], files.contents[number] = number, bytearray(path.read_bytes())
    return files


def read_log(log: Path, root: Path, before: Files) -> DiskLog:
    """Parse what strace wrote; calls that failed, and files elsewhere, are left out."""
    operations = _Reader(root, before).read(log)
    return DiskLog(before=before, operations=operations, durable_at=_durable_at(operations))


class _Reader:
    def __init__(self, root: Path, before: Files) -> None:
        self._root = f"{root}/"
        self._names: dict[str, int] = {name: what for name, what in before.names.items() if isinstance(what, int)}
        self._inodes = max(before.contents, default=0)
        self._offsets: dict[tuple[str, str], int] = {}
        self._appending: set[tuple[str, str]] = set()
        self._sizes = {inode: len(content) for inode, content in before.contents.items()}
        self._operations: list[Operation] = []

    def read(self, log: Path) -> list[Operation]:
        begun: dict[str, tuple[str, int]] = {}
        with log.open(encoding="ascii") as lines:
            for line in lines:
                line = line.rstrip("\n")
                at = len(self._operations)
                if match := _BEGUN.match(line):
                    begun[match[1]] = match[2], at
                    continue
                if match := _ENDED.match(line):
                    text, at = begun.pop(match[1])
                    line = f"{match[1]} {text}{', ' if match[2] and not match[2].startswith(')') else ''}{match[2]}"
                if (match := _CALL.match(line)) and int(match[4]) >= 0:
                    self._take(match[2], match[3], int(match[4]), match[5], at)
        return self._operations

    def _take(self, call: str, arguments: str, result: int, rest: str, at: int) -> None:
        paths = self._paths(call, arguments)
        if call in _NOT_MODELLED and any(path is not None for path in paths):
            raise BenchError(f"{call} on {paths} is not modelled by bench.disk_log; add it there")
        if call == "sendto":
            self._operations.append(Sent(data=_bytes(arguments)))
        elif call == "openat":
            self._open(arguments, _described(rest.strip()), result)
        elif paths and paths[0] is not None:
            self._change(call, arguments, paths, result, at)

    def _change(self, call: str, arguments: str, paths: list[str | None], result: int, at: int) -> None:
        path = paths[0]
        assert path is not None
        inode = self._names.get(path, 0)
        if call in ("write", "pwrite64", "lseek", "ftruncate"):
            self._change_file(call, arguments, path, inode, result)
        elif call in ("fsync", "fdatasync"):
            self._operations.append(Sync(upto=at, inode=inode) if inode else Sync(upto=at, directory=path))
        elif call.startswith("rename"):
            self._rename(path, paths[1])
        elif call.startswith("symlink"):
            self._operations.append(Name(kind="symlink", path=path, target=_strings(arguments)[0].decode()))
        elif call.startswith("mkdir"):
            self._operations.append(Name(kind="mkdir", path=path))
        elif call == "rmdir" or "AT_REMOVEDIR" in arguments:
            self._operations.append(Name(kind="rmdir", path=path))
        else:
            self._names.pop(path, None)
            self._operations.append(Name(kind="unlink", path=path))

    def _open(self, arguments: str, opened: str, descriptor: int) -> None:
        path = self._inside(opened)
        if path is None:
            return
        self._offsets[str(descriptor), path] = 0
        if "O_CREAT" in arguments and path not in self._names:
            self._inodes += 1
            self._names[path] = self._inodes
            self._operations.append(Name(kind="create", path=path, inode=self._inodes))
        elif "O_TRUNC" in arguments:
            self._truncate(self._names[path], 0)
        if "O_APPEND" in arguments:
            self._appending.add((str(descriptor), path))
        else:
            self._appending.discard((str(descriptor), path))

    def _change_file(self, call: str, arguments: str, path: str, inode: int, result: int) -> None:
        match = _DESCRIPTOR.match(arguments)
        assert match
        key = (match[1] or "", path)
        if call == "lseek":
            self._offsets[key] = result
        elif call == "ftruncate":
            self._truncate(inode, int(arguments.rpartition(",")[2]))
        else:
            is_positioned = call == "pwrite64"
            at = self._sizes.get(inode, 0) if key in self._appending else self._offsets.get(key, 0)
            offset = int(arguments.rpartition(",")[2]) if is_positioned else at
            self._sizes[inode] = max(self._sizes.get(inode, 0), offset + result)
            self._operations.append(Write(inode=inode, offset=offset, data=_bytes(arguments)[:result]))
            if not is_positioned:
                self._offsets[key] = offset + result

    def _truncate(self, inode: int, size: int) -> None:
        self._sizes[inode] = size
        self._operations.append(Truncate(inode=inode, size=size))

    def _rename(self, path: str, target: str | None) -> None:
        if target is None:
            raise BenchError(f"{path} is renamed out of the directory, which bench.disk_log does not model")
        for name in [n for n in self._names if n == path or n.startswith(f"{path}/")]:
            self._names[target + name[len(path) :]] = self._names.pop(name)
        self._operations.append(Name(kind="rename", path=path, target=target))

    def _paths(self, call: str, arguments: str) -> list[str | None]:
        """The paths that a call names, relative to the root; None for one elsewhere."""
        if _DESCRIPTOR.match(arguments):
            base = _described(arguments)
            if not call.endswith("at") and call != "renameat2":
                return [self._inside(base)]
        else:
            base = ""
        strings = [text.decode(errors="replace") for text in _strings(arguments)]
        if call.startswith("symlink"):
            strings = strings[1:]
        return [self._inside(text if text.startswith("/") else f"{base}/{text}") for text in strings]

    def _inside(self, path: str) -> str | None:
        if f"{path}/" == self._root:
            return ""
        return path.removeprefix(self._root) if path.startswith(self._root) else None


def crash_state(log: DiskLog, count: int, rng: random.Random, *, keep: float = 0.5) -> Files:
    """One content that the directory may have when the power goes after `count` operations.

    Args:
        log: what happened.
        count: so many operations had returned.
        rng: chooses.
        keep: the share of what was not synced that survives; 0 and 1 are legal extremes.
    """
    files, lost = log.before.copy(), set[str]()
    for operation, durable_at in zip(log.operations[:count], log.durable_at, strict=False):
        is_safe = durable_at < count
        if isinstance(operation, Name):
            is_kept = is_safe or (rng.random() < keep and not operation.touches & lost)
            if is_kept:
                _apply_name(files, operation)
            else:
                lost |= operation.touches
        elif isinstance(operation, Truncate) and (is_safe or rng.random() < keep):
            _resize(files.contents.setdefault(operation.inode, bytearray()), operation.size)
        elif isinstance(operation, Write):
            _apply_write(files, operation, is_safe=is_safe, rng=rng, keep=keep)
    return files


def _durable_at(operations: Sequence[Operation]) -> list[int]:
    found = [len(operations)] * len(operations)
    waiting: dict[int | str, list[int]] = {}  # by file number, or directory
    for position, operation in enumerate(operations):
        if isinstance(operation, Write | Truncate):
            waiting.setdefault(operation.inode, []).append(position)
        elif isinstance(operation, Name):
            waiting.setdefault(operation.directory, []).append(position)
        elif isinstance(operation, Sync):
            key = operation.inode if operation.directory is None else operation.directory
            for earlier in waiting.get(key, []):
                if earlier < operation.upto:
                    found[earlier] = position
            waiting[key] = [earlier for earlier in waiting.get(key, []) if earlier >= operation.upto]
    return found


def _apply_name(files: Files, change: Name) -> None:
    if change.kind == "create":
        files.names[change.path] = change.inode
        files.contents.setdefault(change.inode, bytearray())
    elif change.kind == "mkdir":
        files.names[change.path] = None
    elif change.kind == "symlink":
        files.names[change.path] = change.target
    elif change.kind == "rename":
        moved = _below(files, change.path)
        for name in _below(files, change.target):
            del files.names[name]
        for name in moved:
            files.names[change.target + name[len(change.path) :]] = files.names.pop(name)
    else:
        for name in _below(files, change.path):
            del files.names[name]


def _below(files: Files, path: str) -> list[str]:
    return [name for name in files.names if name == path or name.startswith(f"{path}/")]


def _apply_write(files: Files, write: Write, *, is_safe: bool, rng: random.Random, keep: float) -> None:
    content = files.contents.setdefault(write.inode, bytearray())
    data = write.data
    if not is_safe and keep < 1:
        fate = rng.random()
        if fate >= keep:
            return
        if fate < keep / 4:
            data = data[: rng.randrange(len(data) + 1)]
        elif fate < keep / 2 and write.offset >= len(content):
            data = bytes(len(data))
    if len(content) < write.offset:
        _resize(content, write.offset)
    content[write.offset : write.offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _strings(arguments: str) -> list[bytes]:
    return [bytes.fromhex(match[1].replace("\\x", "")) for match in _STRING.finditer(arguments)]


def _bytes(arguments: str) -> bytes:
    match = _STRING.search(arguments)
    if match is None or match[2]:
        raise BenchError("strace cut a string short; raise its -s")
    return bytes.fromhex(match[1].replace("\\x", ""))


def _described(text: str) -> str:
    """The path of the file that a descriptor stands for."""
    match = _DESCRIPTOR.match(text)
    if match is None:
        return ""
    return bytes.fromhex(match[2].replace("\\x", "")).decode(errors="replace") + (match[3] or "")


def lines_of(log: DiskLog, path: str) -> Iterator[tuple[int, bytes]]:
    """The positions of appends of whole lines to a file, for example to a journal."""
    names = {name: what for name, what in log.before.names.items() if isinstance(what, int)}
    for position, operation in enumerate(log.operations):
        if isinstance(operation, Name) and operation.kind == "create":
            names[operation.path] = operation.inode
        elif isinstance(operation, Write) and operation.inode == names.get(path):
            yield position, operation.data
