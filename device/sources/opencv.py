"""OpenCV (`fieldvit[camera]`), loaded only where frames come from a video file or a V4L2 camera.

It is kept to one thread: the others are the model's. What it and FFmpeg would print goes nowhere: a camera that is away
would fill the log, and no line of it says what the agent's own does not. What it decodes is BGR and becomes RGB here, once.
"""

import os
from importlib import import_module
from typing import Any

import numpy as np

from device.contract.errors import ConfigError, FrameError

_QUIET = {"OPENCV_LOG_LEVEL": "SILENT", "OPENCV_FFMPEG_LOGLEVEL": "-8"}
"""Read when the module is loaded; who sets them otherwise has a reason."""


def load_opencv() -> Any:
    """The module `cv2`; ConfigError where it is not installed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        cv2: Any = import_module("cv2")
    except ImportError as error:
        raise ConfigError(
            f"a camera or a video file needs OpenCV ({error}); pip install 'fieldvit[camera]', or set source.kind"
        ) from error
    cv2.setNumThreads(1)
    return cv2


def to_rgb(cv2: Any, image: np.ndarray, name: str) -> np.ndarray:
    """RGB uint8 [h, w, 3], in memory of its own, of what OpenCV read: BGR [h, w, 3], or grey [h, w].

    Raises:
        FrameError: it is neither.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise FrameError(f"{name}: gives {image.dtype} {list(image.shape)}, not 8-bit BGR or grey", reason="shape")
    code = cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB
    return np.asarray(cv2.cvtColor(image, code))
