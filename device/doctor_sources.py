"""Checks of the doctor that look at where frames come from: is it there, may it be read, is what reads it installed?

A video file and a camera are read once, but a camera only where no agent runs, which would have it.
"""

import grp
import os
import stat
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from device.config import SourceConfig
from device.contract.errors import ConfigError, FrameError
from device.doctor_checks import Finding
from device.sources.open import open_capture, require_installed


def check_source(root: Path, config: SourceConfig, *, is_running: bool) -> Finding:
    """Whether frames can come.

    Args:
        root: where a relative path starts.
        config: the source.
        is_running: whether an agent is; it has the camera then.
    """
    if config.kind == "directory":
        path = root / config.path
        advice = f"mkdir -p {path}, or set source.path in agent.toml"
        return Finding(check="frames", ok=path.is_dir(), text=str(path), advice=advice)
    if config.kind == "mqtt":
        has_pillow = find_spec("PIL") is not None
        text = "pictures over MQTT, " + ("of any kind" if has_pillow else "raw ones only (.npy, PGM, PPM)")
        return Finding(check="frames", ok=True, text=text, advice="" if has_pillow else "pip install pillow for JPEG")
    try:
        require_installed(config.kind)
    except ConfigError as error:
        return Finding(check="frames", ok=False, text=str(error), advice="install it, then start the agent again")
    if config.kind == "camera" and (problem := _refusal(config.device)):
        return Finding(check="frames", ok=False, text=f"{config.device}: {problem}", advice=_advice(config.device))
    if is_running and config.kind != "video":
        text = f"{config.device or 'CSI camera'}: the running agent has it; see 'fieldvit-device status'"
        return Finding(check="frames", ok=True, text=text)
    return _read_one(root, config)


def _read_one(root: Path, config: SourceConfig) -> Finding:
    advice = "see [source] in agent.toml, cables and power"
    try:
        capture = open_capture(config, root)
        try:
            frame = capture.read(threading.Event())
        finally:
            capture.close()
    except FrameError as error:
        return Finding(check="frames", ok=False, text=str(error), advice=advice)
    if frame is None:
        return Finding(check="frames", ok=False, text=f"{config.path}: holds no frames", advice=advice)
    height, width, _ = frame[1].shape
    return Finding(check="frames", ok=True, text=f"{config.device or config.path}: gives {width}x{height}")


def _refusal(device: str) -> str:
    if sys.platform != "linux":  # a number, not a file
        return ""
    try:
        mode = os.stat(device).st_mode
    except OSError as error:
        return error.strerror or "cannot be seen"
    if not stat.S_ISCHR(mode):
        return "is no device"
    return "" if os.access(device, os.R_OK | os.W_OK) else "this user may not use it"


def _advice(device: str) -> str:
    if not os.path.exists(device):
        return "plug the camera in, or set source.device; 'ls /dev/v4l/by-id' lists what there is"
    try:
        group = grp.getgrgid(os.stat(device).st_gid).gr_name
    except (KeyError, OSError):
        group = "video"
    return (
        f"usermod -aG {group} USER, and log in again; the service that 'fieldvit-device setup' writes is in it already"
    )
