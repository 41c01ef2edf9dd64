"""Frames from a directory: each new file is one frame, read once, in the order of the names.

`.npy` (uint8 [h, w] or [h, w, C]) and binary PGM / PPM are read with NumPy alone; PNG, JPEG and others need Pillow. A file
that cannot be read may still be on its way: it is tried again until it has not changed for `SETTLE_S`, then reported
once and left alone. Files with other suffixes and hidden files are ignored, so write as `x.part` and rename where you can.

A frame's id is its relative path without suffix: `day/0001.png` is `day/0001`. Where files that lie there would share one
(`a.pgm` and `a.npy`, `a b.pgm` and `a_b.pgm`), each that is read while the others are there gets a hash of its name behind
a `~` instead, always the same. So an id never names two files at a time, whatever order they came in and after a restart.
"""

import hashlib
import io
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.contract.errors import FrameError

RAW_SUFFIXES = {".npy", ".pgm", ".ppm"}
PILLOW_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
_SUFFIXES = RAW_SUFFIXES | PILLOW_SUFFIXES
MAX_FRAME_BYTES = 64 << 20
MAX_ID_CHARACTERS = 200
SETTLE_S = 2.0
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{0,64})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,64})\), \} *\n",
    re.DOTALL,
)
"""Version 1.0, as `np.save` writes it. NumPy's own reader takes more, but fails on damage with errors of any kind."""
_PNM_HEADER = re.compile(rb"(P[56])@+(\d{1,9})@+(\d{1,9})@+(\d{1,9})\s".replace(b"@", rb"(?:\s|#[^\n]*\n)"))
_HEADER_BYTES = 4096
"""Where a header must end; with it and the bounded numbers above, no file keeps the patterns or `int` busy."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded image: uint8 [h, w, C]."""

    frame_id: str
    pixels: np.ndarray


class DirectorySource:
    """Watches a directory tree; memory is bounded by the number of files that lie there."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self.errors = 0
        self._clock = clock
        self._done: set[str] = set()
        self._ids: dict[str, str] = {}  # of all files that lie there, by name
        self._shared: Counter[str] = Counter()
        self._pending: dict[str, tuple[tuple[int, int], float]] = {}

    def poll(self, channels: int) -> Iterator[Frame]:
        """Yield the frames that are new since the last poll and can be read by now."""
        names = _frame_files(self.directory)
        present = set(names)
        self._done &= present
        self._note_ids(present)
        self._pending = {name: state for name, state in self._pending.items() if name in present}
        for name in names:
            if name not in self._done:
                yield from self._read(name, channels)

    def _note_ids(self, present: set[str]) -> None:
        for name in self._ids.keys() - present:
            frame_id = self._ids.pop(name)
            self._shared[frame_id] -= 1
            if not self._shared[frame_id]:
                del self._shared[frame_id]
        for name in present - self._ids.keys():
            self._ids[name] = frame_id_of(name)
            self._shared[self._ids[name]] += 1

    def _id_of(self, name: str) -> str:
        return self._ids[name] if self._shared[self._ids[name]] == 1 else distinct_id_of(name)

    def _read(self, name: str, channels: int) -> Iterator[Frame]:
        path = self.directory / name
        try:
            stat = path.stat()
        except OSError:  # gone again
            return
        try:
            frame = Frame(self._id_of(name), read_frame(path, channels))
        except FrameError as error:
            self._retry_later(name, (stat.st_mtime_ns, stat.st_size), error)
            return
        self._done.add(name)
        self._pending.pop(name, None)
        yield frame

    def _retry_later(self, name: str, stamp: tuple[int, int], error: FrameError) -> None:
        now = self._clock()
        known, since = self._pending.setdefault(name, (stamp, now))
        if known != stamp:
            self._pending[name] = (stamp, now)
        elif now - since >= SETTLE_S:
            self._done.add(name)
            del self._pending[name]
            self.errors += 1
            log.warning("frame skipped: %s", error)


def read_frame(path: Path, channels: int) -> np.ndarray:
    """Decode one file to uint8 [h, w, C]. `channels` is what Pillow converts to; raw files are taken as they are.

    Raises:
        FrameError: the file is too large, damaged, not 8 bits deep, of an unknown kind, or needs Pillow.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(sorted(_SUFFIXES))
        raise FrameError(f"{path}: frames are {known}, not {suffix or 'a file without suffix'}")
    try:
        if path.stat().st_size > MAX_FRAME_BYTES:
            raise FrameError(f"{path}: {path.stat().st_size} bytes is over the limit of {MAX_FRAME_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise FrameError(f"{path}: cannot be read ({error.strerror})") from error
    decode = _parse_npy if suffix == ".npy" else _parse_pnm if suffix in RAW_SUFFIXES else _decode_with_pillow
    try:
        return decode(content, path, channels)
    except FrameError:
        raise
    except (
        Exception
    ) as error:  # no damage may escape: the file lies there at every start, and would end the agent each time
        raise FrameError(f"{path}: the decoder failed ({type(error).__name__}: {error})") from error


def list_frames(path: Path) -> list[tuple[str, Path]]:
    """Frame ids and files of a directory, or of one file."""
    if not path.is_dir():
        return [(frame_id_of(path.name), path)]
    names = _frame_files(path)
    ids = [frame_id_of(name) for name in names]
    counts = Counter(ids)
    return [
        (frame_id if counts[frame_id] == 1 else distinct_id_of(name), path / name)
        for name, frame_id in zip(names, ids, strict=True)
    ]


def named_frames(paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """Frame ids and files of all these files and directories; FrameError where one is missing or holds none."""
    files = []
    for path in paths:
        if not path.exists():
            raise FrameError(f"{path}: no such file or directory")
        found = list_frames(path)
        if not found:
            raise FrameError(f"{path}: holds no frames (.npy, .pgm, .ppm, .png, .jpg, ...)")
        files += found
    return files


def frame_id_of(name: str) -> str:
    """A frame's id: its relative path without suffix, with white space and control characters replaced."""
    return re.sub(r"[^\w./-]", "_", str(Path(name).with_suffix("")))[-MAX_ID_CHARACTERS:]


def distinct_id_of(name: str) -> str:
    """The id of a frame whose plain id belongs to other files too: with `~` and a hash of its whole name."""
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f"{frame_id_of(name)[9 - MAX_ID_CHARACTERS :]}~{digest}"


def _frame_files(directory: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = "" if folder == str(directory) else os.path.relpath(folder, directory) + os.sep
        names += [prefix + name for name in files if _is_frame(name)]
    return sorted(names)


def _is_frame(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _SUFFIXES


def _parse_npy(content: bytes, path: Path, _channels: int) -> np.ndarray:
    header = _NPY_HEADER.match(content[:_HEADER_BYTES])
    if header is None:
        raise FrameError(f"{path}: not a .npy array of version 1.0, or cut off")
    shape = tuple(int(size) for size in header.group(3).replace(b",", b" ").split())
    if header.group(1) != b"|u1" or len(shape) not in (2, 3) or 0 in shape:
        raise FrameError(
            f"{path}: expected uint8 [h, w] or [h, w, C], got {header.group(1).decode(errors='replace')} {list(shape)}"
        )
    data = content[header.end() :]
    if len(data) != math.prod(shape):
        raise FrameError(f"{path}: holds {len(data)} of {math.prod(shape)} bytes of pixels; it is cut off or damaged")
    pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if header.group(2) == b"True" else "C")
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _parse_pnm(content: bytes, path: Path, _channels: int) -> np.ndarray:
    header = _PNM_HEADER.match(content[:_HEADER_BYTES])
    if header is None:
        raise FrameError(f"{path}: not a binary PGM (P5) or PPM (P6) file")
    width, height, maximum = (int(header.group(i)) for i in (2, 3, 4))
    channels = 1 if header.group(1) == b"P5" else 3
    if maximum != 255 or not width or not height:
        raise FrameError(f"{path}: expected 8 bits (maximum 255) and a size, got maximum {maximum}, {width}x{height}")
    data = content[header.end() :]
    if len(data) < width * height * channels:
        raise FrameError(f"{path}: holds {len(data)} of {width * height * channels} bytes of pixels; it is cut off")
    return np.frombuffer(data, np.uint8, count=width * height * channels).reshape(height, width, channels)


def _decode_with_pillow(content: bytes, path: Path, channels: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise FrameError(
            f"{path}: {path.suffix} needs Pillow; 'pip install pillow', or send .npy, PGM or PPM"
        ) from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            if (
                image.width * image.height * channels > MAX_FRAME_BYTES
            ):  # before it is unpacked: a board has little memory
                raise FrameError(
                    f"{path}: {image.width}x{image.height} pixels are over the limit of {MAX_FRAME_BYTES} bytes"
                )
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except FrameError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FrameError(f"{path}: Pillow cannot decode it ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
