"""A V4L2 camera (USB, or any other that has a /dev/video file), through OpenCV; on macOS a camera's number.

A camera that is unplugged fails its next read within OpenCV's ten seconds, and is opened again when it is back. A frame's
id is `camera/`, a word that is new whenever the camera is opened, and a number.
"""

import os
import sys
import threading
from itertools import count
from typing import Any

import numpy as np

from device.contract.errors import FrameError
from device.contract.record import record
from device.sources.opencv import load_opencv, to_rgb


@record(frozen=True, slots=True, kw_only=True)
class CameraMode:
    """What a camera is asked for; 0 leaves it to the driver, which may also give something near instead."""

    width: int = 0
    height: int = 0
    fps: float = 0.0


class LiveIds:
    """Ids of frames that have no name: none comes twice, not even after a restart with a wrong clock."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._numbers = f"{prefix}/{os.urandom(6).hex()}", count()

    def __next__(self) -> str:
        return f"{self._prefix}-{next(self._numbers):08d}"


class CameraCapture:
    """A camera while it is there."""

    def __init__(self, device: str, mode: CameraMode) -> None:
        """Open it.

        Raises:
            FrameError: it is not there, in use, or this user may not read it.
        """
        self._cv2 = cv2 = load_opencv()
        self._device, self._ids = device, LiveIds("camera")
        self._buffer: np.ndarray | None = None
        is_linux = sys.platform == "linux"
        if is_linux and not os.path.exists(device):
            raise FrameError(f"{device}: no such camera; is it plugged in?", reason="source")
        if is_linux and not os.access(device, os.R_OK | os.W_OK):
            raise FrameError(f"{device}: may not be used; put the agent's user into the group video", reason="source")
        wanted = {
            cv2.CAP_PROP_FRAME_WIDTH: mode.width,
            cv2.CAP_PROP_FRAME_HEIGHT: mode.height,
            cv2.CAP_PROP_FPS: mode.fps,
        }
        self._capture: Any = cv2.VideoCapture(
            device if is_linux else int(device), cv2.CAP_V4L2 if is_linux else cv2.CAP_ANY
        )
        if not self._capture.isOpened():
            raise FrameError(f"{device}: cannot be opened as a camera; is another program using it?", reason="source")
        for option, value in wanted.items():
            if value:
                self._capture.set(option, value)
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # what waits in the driver is stale

    def read(self, _stop: threading.Event) -> tuple[str, np.ndarray] | None:
        is_read, self._buffer = self._capture.read(self._buffer)
        if not is_read or self._buffer is None:
            raise FrameError(f"{self._device}: the camera gives no more frames; is it plugged in?", reason="source")
        return next(self._ids), to_rgb(self._cv2, self._buffer, self._device)

    def close(self) -> None:
        self._capture.release()
