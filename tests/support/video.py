"""Videos as OpenCV writes them: lossless, and small ones that are not."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'fieldvit[camera]'")

LOSSLESS, MOTION_JPEG = "MPNG", "MJPG"


def write_video(path: Path, frames: Iterable[np.ndarray], *, fps: float = 25.0, codec: str = LOSSLESS) -> Path:
    """Write frames uint8 [h, w, 3], RGB."""
    frames = list(frames)
    height, width, _ = frames[0].shape
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
    writer.release()
    return path


def noise(count: int, height: int = 24, width: int = 32, *, seed: int = 0) -> np.ndarray:
    """Frames uint8 [n, h, w, 3] of noise, so that no two are the same."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
