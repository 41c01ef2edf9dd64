"""Frames: uint8 pixels with an id, and how an encoded one is decoded, whether it comes as a file or as a message.

`.npy` (uint8 [h, w] or [h, w, C]) and binary PGM / PPM are read with NumPy alone; PNG, JPEG and others need Pillow. No
damage may escape as another error than `FrameError`: a file lies there at every start, and would end the agent each time.
"""

import io
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.contract.errors import FrameError
from device.pictures import upright_rgb

RAW_SUFFIXES = {".npy", ".pgm", ".ppm"}
PILLOW_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
"""No others are tried: some of Pillow's decoders start programs."""
SUFFIXES = RAW_SUFFIXES | PILLOW_SUFFIXES
MAX_FRAME_BYTES = 64 << 20
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{0,64})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,64})\), \} *\n",
    re.DOTALL,
)
"""Version 1.0, as `np.save` writes it. NumPy's own reader takes more, but fails on damage with errors of any kind."""
_PNM_HEADER = re.compile(rb"(P[56])@+(\d{1,9})@+(\d{1,9})@+(\d{1,9})\s".replace(b"@", rb"(?:\s|#[^\n]*\n)"))
_HEADER_BYTES = 4096
"""Where a header must end; with it and the bounded numbers above, no file keeps the patterns or `int` busy."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded image: uint8 [h, w, C]."""

    frame_id: str
    pixels: np.ndarray


def read_frame(path: Path, channels: int) -> np.ndarray:
    """Decode one file to uint8 [h, w, C]. `channels` is what Pillow converts to; raw files are taken as they are.

    Raises:
        FrameError: the file is too large, damaged, not 8 bits deep, of an unknown kind, or needs Pillow.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(sorted(SUFFIXES))
        raise FrameError(f"{path}: frames are {known}, not {suffix or 'a file without suffix'}")
    content = _read_bounded(path)
    kind = "npy" if suffix == ".npy" else "pnm" if suffix in RAW_SUFFIXES else "picture"
    return _decode(content, str(path), channels, kind)


def _read_bounded(path: Path) -> bytes:
    """A file's content; a pipe would never end, nor does a link to a device, and both may lie in a directory of frames."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FrameError(f"{path}: is no plain file; put frames there as files")
            content = file.read(MAX_FRAME_BYTES + 1) if status.st_size <= MAX_FRAME_BYTES else b""
    except OSError as error:
        raise FrameError(f"{path}: cannot be read ({error.strerror})") from error
    if (size := max(status.st_size, len(content))) > MAX_FRAME_BYTES:
        raise FrameError(f"{path}: {size} bytes is over the limit of {MAX_FRAME_BYTES}", reason="too-large")
    return content


def decode_frame(content: bytes, name: str, channels: int) -> np.ndarray:
    """Decode bytes of any kind that a file may hold to uint8 [h, w, C]; the beginning says which. Errors as `read_frame`."""
    kind = "npy" if content.startswith(b"\x93NUMPY") else "pnm" if content[:2] in (b"P5", b"P6") else "picture"
    return _decode(content, name, channels, kind)


def _decode(content: bytes, name: str, channels: int, kind: str) -> np.ndarray:
    decode = {"npy": _parse_npy, "pnm": _parse_pnm, "picture": _decode_with_pillow}[kind]
    try:
        return decode(content, name, channels)
    except FrameError:
        raise
    except Exception as error:  # whatever a decoder makes of damage
        raise FrameError(f"{name}: the decoder failed ({type(error).__name__}: {error})") from error


def _parse_npy(content: bytes, name: str, _channels: int) -> np.ndarray:
    header = _NPY_HEADER.match(content[:_HEADER_BYTES])
    if header is None:
        raise FrameError(f"{name}: not a .npy array of version 1.0, or cut off")
    shape = tuple(int(size) for size in header.group(3).replace(b",", b" ").split())
    if header.group(1) != b"|u1" or len(shape) not in (2, 3) or 0 in shape:
        raise FrameError(
            f"{name}: expected uint8 [h, w] or [h, w, C], got {header.group(1).decode(errors='replace')} {list(shape)}"
        )
    data = content[header.end() :]
    if len(data) != math.prod(shape):
        raise FrameError(f"{name}: holds {len(data)} of {math.prod(shape)} bytes of pixels; it is cut off or damaged")
    pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if header.group(2) == b"True" else "C")
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _parse_pnm(content: bytes, name: str, _channels: int) -> np.ndarray:
    header = _PNM_HEADER.match(content[:_HEADER_BYTES])
    if header is None:
        raise FrameError(f"{name}: not a binary PGM (P5) or PPM (P6) file")
    width, height, maximum = (int(header.group(i)) for i in (2, 3, 4))
    channels = 1 if header.group(1) == b"P5" else 3
    if maximum != 255 or not width or not height:
        raise FrameError(f"{name}: expected 8 bits (maximum 255) and a size, got maximum {maximum}, {width}x{height}")
    data = content[header.end() :]
    if len(data) < width * height * channels:
        raise FrameError(f"{name}: holds {len(data)} of {width * height * channels} bytes of pixels; it is cut off")
    return np.frombuffer(data, np.uint8, count=width * height * channels).reshape(height, width, channels)


def _decode_with_pillow(content: bytes, name: str, channels: int) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise FrameError(
            f"{name}: a picture of this kind needs Pillow; 'pip install pillow', or send .npy, PGM or PPM"
        ) from error
    try:
        with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
            size = image.width * image.height * max(3, len(image.getbands()))  # grey comes by way of RGB
            if size > MAX_FRAME_BYTES:  # before it is unpacked: a board has little memory
                raise FrameError(
                    f"{name}: {image.width}x{image.height} pixels are over the limit of {MAX_FRAME_BYTES} bytes",
                    reason="too-large",
                )
            upright = upright_rgb(image)
            pixels = np.asarray(upright.convert("L") if channels == 1 else upright)
    except FrameError:
        raise
    except Image.DecompressionBombError as error:
        raise FrameError(f"{name}: {error}", reason="too-large") from error
    except UnidentifiedImageError as error:  # whose words are about a buffer in memory
        kinds = ", ".join(PILLOW_FORMATS)
        raise FrameError(f"{name}: Pillow cannot decode it (it is none of {kinds})") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise FrameError(f"{name}: Pillow cannot decode it ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
