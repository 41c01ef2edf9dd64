"""The frame source that agent.toml asks for. What only cameras need is loaded only where there is one."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from device.config import SourceConfig
from device.sources.directory import DirectorySource
from device.sources.messages import MessageSource
from device.sources.source import Source

if TYPE_CHECKING:
    from device.sources.grabber import Capture


def open_source(config: SourceConfig, root: Path) -> Source:
    """Make the source; devices and files are opened after its `start`.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    if config.kind == "directory":
        return DirectorySource(root / config.path)
    if config.kind == "mqtt":
        return MessageSource(config.queue)
    from device.sources.grabber import Grabber

    require_installed(config.kind)
    is_video = config.kind == "video"
    return Grabber(
        config.kind,
        partial(open_capture, config, root),
        is_live=not is_video or config.realtime,
        is_endless=not is_video or config.loop,
    )


def require_installed(kind: str) -> None:
    """ConfigError where what a camera or a video file needs is not installed."""
    if kind == "picamera":
        from device.sources.picamera import load_picamera2

        load_picamera2()
    else:
        from device.sources.opencv import load_opencv

        load_opencv()


def open_capture(config: SourceConfig, root: Path) -> "Capture":
    """Open the video file or the camera.

    Raises:
        FrameError: it cannot be opened now.
    """
    if config.kind == "video":
        from device.sources.video import VideoCapture

        return VideoCapture(root / config.path, is_realtime=config.realtime)
    from device.sources.camera import CameraCapture, CameraMode

    mode = CameraMode(width=config.width, height=config.height, fps=config.fps)
    if config.kind == "camera":
        return CameraCapture(config.device, mode)
    from device.sources.picamera import PicameraCapture

    return PicameraCapture(int(config.device or "0"), mode)
