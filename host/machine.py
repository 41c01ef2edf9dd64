"""The machine that a figure was measured on; never its name, its user or a path."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Describe this machine: processor, usable cores, memory, system, Python."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{_os_name()}, {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(re.findall(r"^(model name|Model)\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE))
        return fields.get("model name") or fields.get("Model") or platform.machine()
    try:
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.check_output(command, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # not macOS either
        return platform.processor() or platform.machine()


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
