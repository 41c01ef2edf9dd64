"""A Raspberry Pi's CSI camera, through picamera2 and libcamera, which come with Raspberry Pi OS: `apt install python3-picamera2`.

Both are built for the system's Python, so the agent's environment must see them: made with `--system-site-packages`.
libcamera's names tell the order of bytes in a word, not in memory: what it calls BGR888 is RGB in an array.
"""

import threading
from importlib import import_module
from typing import Any

import numpy as np

from device.contract.errors import ConfigError, FrameError
from device.sources.camera import CameraMode, LiveIds

READ_S = 10.0
DEFAULT_SIZE = (640, 480)


def load_picamera2() -> Any:
    """The module `picamera2`; ConfigError where it is not there."""
    try:
        return import_module("picamera2")
    except Exception as error:  # libcamera's bindings fail in ways of their own where they do not fit
        raise ConfigError(
            f"the CSI camera needs picamera2 ({type(error).__name__}: {error}); apt install python3-picamera2, and make "
            "the agent's environment with --system-site-packages"
        ) from error


class PicameraCapture:
    """The camera while it runs."""

    def __init__(self, number: int, mode: CameraMode) -> None:
        """Open and start it.

        Raises:
            FrameError: there is no such camera, or it is in use.
        """
        self._number, self._ids = number, LiveIds("csi")
        module = load_picamera2()
        if number >= len(module.Picamera2.global_camera_info()):
            raise FrameError(f"CSI camera {number} is not there; see 'rpicam-hello --list-cameras'", reason="source")
        try:
            self._camera: Any = module.Picamera2(number)
        except (RuntimeError, IndexError) as error:
            raise FrameError(f"CSI camera {number} cannot be opened ({error})", reason="source") from error
        size = (mode.width, mode.height) if mode.width and mode.height else DEFAULT_SIZE
        controls = {"FrameRate": mode.fps} if mode.fps else {}
        try:
            self._camera.configure(  # queue: no frame from before it was asked for
                self._camera.create_video_configuration(
                    main={"format": "BGR888", "size": size}, controls=controls, queue=False
                )
            )
            self._camera.start()
        except Exception as error:
            self.close()
            raise FrameError(f"CSI camera {number} cannot be started ({error})", reason="source") from error

    def read(self, _stop: threading.Event) -> tuple[str, np.ndarray] | None:
        try:
            job = self._camera.capture_array("main", wait=False)
            pixels = self._camera.wait(job, timeout=READ_S)
        except Exception as error:  # TimeoutError, and what libcamera raises
            problem = f"CSI camera {self._number} gives no more frames ({type(error).__name__}: {error})"
            raise FrameError(problem, reason="source") from error
        return next(self._ids), np.ascontiguousarray(pixels)

    def close(self) -> None:
        self._camera.close()
