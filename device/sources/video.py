"""Frames of a video file, through FFmpeg in OpenCV. A frame's id is the file's name without suffix, and its number from 0.

With `realtime` the file stands in for a camera: it runs at its own rate, and a model that is slower misses frames. Without,
every frame is classified, as fast as the board can. A file that ends before the number of frames that it promises was cut
off: that is counted, and what there is of it is used.
"""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from device.contract.errors import FrameError
from device.frames import MAX_FRAME_BYTES
from device.sources.directory import frame_id_of
from device.sources.opencv import load_opencv, to_rgb

FALLBACK_FPS = 25.0
"""For files that do not say."""
CUT_SHARE = 0.98
"""Containers estimate their number of frames; fewer than this share of it is a cut."""


class VideoCapture:
    """One pass over a file."""

    def __init__(self, path: Path, *, is_realtime: bool) -> None:
        """Open it.

        Raises:
            FrameError: it is missing, or no video that FFmpeg can decode.
        """
        self._cv2 = cv2 = load_opencv()
        self._path, self._is_realtime = path, is_realtime
        if not path.is_file():  # a pipe without a writer, for one, would hold the thread up for ever
            raise FrameError(f"{path}: no such video file; see source.path in agent.toml", reason="source")
        self._capture: Any = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not self._capture.isOpened():
            raise FrameError(f"{path}: no video that can be decoded; it may be damaged", reason="source")
        width, height = (self._capture.get(p) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if 3 * width * height > MAX_FRAME_BYTES:
            self.close()
            raise FrameError(
                f"{path}: {width:.0f}x{height:.0f} pixels are over the limit of {MAX_FRAME_BYTES} bytes",
                reason="too-large",
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self._interval_s = 1 / (fps if 0 < fps <= 1000 else FALLBACK_FPS)
        self._promised = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self._count = 0
        self._started = time.monotonic()
        self._buffer: np.ndarray | None = None

    def read(self, stop: threading.Event) -> tuple[str, np.ndarray] | None:
        if self._is_realtime:
            stop.wait(max(0.0, self._started + self._count * self._interval_s - time.monotonic()))
        is_read, self._buffer = self._capture.read(self._buffer)
        if not is_read or self._buffer is None:
            if self._count < CUT_SHARE * self._promised:
                raise FrameError(
                    f"{self._path}: ends after {self._count} of {self._promised:.0f} frames; it is cut off or damaged"
                )
            return None
        frame_id = f"{frame_id_of(self._path.name)}/{self._count:06d}"
        self._count += 1
        return frame_id, to_rgb(self._cv2, self._buffer, str(self._path))

    def close(self) -> None:
        self._capture.release()
