"""What an operator wants to know of a board that misbehaves: bounded, and without secrets.

No configuration value is in it but names and numbers, and of log lines only their beginning.
"""

import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from device.contract.errors import DeviceError
from device.telemetry import memory_bytes, peak_memory_bytes, soc_temp_celsius

ERRORS_KEPT = 20
TEXT_KEPT = 300
THREADS_SHOWN = 50
_PACKAGES = ("fieldvit", "ai-edge-litert", "tflite-runtime", "numpy", "paho-mqtt", "tuf")


class ErrorLog(logging.Handler):
    """Keeps the beginning of the last warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._entries: deque[dict[str, Any]] = deque(maxlen=ERRORS_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # a log line that does not fit its arguments must not cost the agent anything
            text = str(record.msg)
        if record.exc_info and record.exc_info[0]:
            text += f" ({record.exc_info[0].__name__}: {record.exc_info[1]})"
        entry = {"time": record.created, "level": record.levelname, "thread": record.threadName}
        self._entries.append(entry | {"text": " ".join(text.split())[:TEXT_KEPT]})

    def entries(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return list(self._entries)


def diagnose(root: Path, errors: ErrorLog) -> dict[str, Any]:
    """Versions, threads, memory, disk, temperature, load, certificate, and the last errors."""
    disk = shutil.disk_usage(root)
    return {
        "time": time.time(),
        "versions": _versions(),
        "threads": sorted(thread.name[:64] for thread in threading.enumerate())[:THREADS_SHOWN],
        "memory_bytes": memory_bytes(),
        "peak_memory_bytes": peak_memory_bytes(),
        "open_files": _open_files(),
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
        "temperature_celsius": soc_temp_celsius(),
        "load": list(os.getloadavg()),
        "uptime_s": time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None,
        "certificate_expires": _certificate_expires(root),
        "errors": errors.entries(),
    }


def _versions() -> dict[str, str]:
    import platform  # here: an agent that nobody asks need not load this
    import ssl
    from importlib import metadata

    found = {"python": platform.python_version(), "openssl": ssl.OPENSSL_VERSION, "system": platform.platform()[:100]}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _open_files() -> int | None:
    try:
        return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))
    except OSError:
        return None


def _certificate_expires(root: Path) -> float | None:
    from device.identity import read_enrolment

    try:
        enrolment = read_enrolment(root)
    except DeviceError:
        return None
    return enrolment.expires if enrolment else None
