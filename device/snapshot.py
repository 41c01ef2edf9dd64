"""The last frame as a small picture, for an operator who asks and whose configuration allows it.

`snapshot = true` in agent.toml is needed; without it no frame is held back and none can leave the board. The picture goes
into the reply, as PNG in base64, and so through the spool: while the broker is away it waits on the board's disk.
"""

import base64
import struct
import zlib
from typing import Any

import numpy as np

from device.contract.errors import FrameError
from device.frames import Frame

MAX_SIDE = 640
MAX_BYTES = 256 << 10
_COLOR_TYPES = {1: 0, 3: 2}
_MIN_SIDE = 16


def take_snapshot(frame: Frame) -> dict[str, Any]:
    """The frame as a reply's result; every n-th pixel where it would be over `MAX_SIDE` or `MAX_BYTES`.

    Raises:
        FrameError: it has neither one channel nor three.
    """
    height, width, channels = frame.pixels.shape
    if channels not in _COLOR_TYPES:
        raise FrameError(f"{frame.frame_id}: a snapshot needs 1 or 3 channels, this frame has {channels}")
    step = max(1, -(-max(height, width) // MAX_SIDE))
    png = encode_png(frame.pixels[::step, ::step])
    while len(png) > MAX_BYTES and max(height, width) // step > _MIN_SIDE:
        step *= 2
        png = encode_png(frame.pixels[::step, ::step])
    small = frame.pixels[::step, ::step]
    return {
        "frame_id": frame.frame_id,
        "width": small.shape[1],
        "height": small.shape[0],
        "frame_width": width,
        "frame_height": height,
        "format": "png",
        "image": base64.b64encode(png).decode(),
    }


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG (W3C, 3rd edition) of uint8 [h, w, 1 or 3]; rows are stored as differences, which photographs gain from."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    left = np.zeros_like(rows)
    left[:, channels:] = rows[:, :-channels]
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = 1  # filter type Sub
    filtered[:, 1:] = rows - left  # modulo 256, as the standard says
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
