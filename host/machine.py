"""The machine that a figure was measured on."""

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Processor, cores, system and Python in one line; no host name."""
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
