"""What a simulated board answers to `status` and `diagnostics`: every key of an agent's answer, None for what it has not."""

import os
from collections.abc import Mapping
from typing import Any

from device.contract.topics import DeviceId
from host.simulate.models import Models
from host.simulate.reporter import RUNTIME, fieldvit_version
from host.simulate.spool import Spool


def status_table(
    models: Models, *, device: DeviceId, boot: str, time: float, spool: Spool, delegate: str
) -> dict[str, Any]:
    """What is served and what was learned; frames, window, sampling and connection are the board's to add."""
    head = models.head
    return models.slots.table() | {
        "boot": boot,
        "pid": os.getpid(),
        "time": time,
        "labels": list(head.labels),
        "learned_version": head.version,
        "runtime": RUNTIME,
        "delegate": delegate,
        "delegate_problem": "",
        "taught": list(head.taught),
        "modules_ok": True,
        "modules": [],
        "device": str(device),
        "errors": 0,
        "source": RUNTIME,
        "source_problem": "",
        "bad_frames": {},
        "frames_dropped": 0,
        "spool_depth": spool.depth,
        "spool_dropped": spool.dropped,
        "results_dropped": 0,
        "problem": "",
        "delegate_fallbacks": 0,
        "last_check": models.last_check,
    }


def diagnose(spool: Spool, window: Mapping[str, float], *, time: float, uptime_s: float) -> dict[str, Any]:
    """Spool, versions, memory and temperature; a simulated board has no disk and no threads."""
    return {
        "spool": {"depth": spool.depth, "bytes": spool.bytes, "dropped": spool.dropped},
        "time": time,
        "versions": {"fieldvit": fieldvit_version()},
        "threads": [],
        "memory_bytes": window.get("memory"),
        "peak_memory_bytes": window.get("memory"),
        "open_files": None,
        "disk_free_bytes": None,
        "disk_total_bytes": None,
        "temperature_celsius": window.get("temperature"),
        "load": [],
        "uptime_s": uptime_s,
        "certificate_expires": None,
        "errors": [],
    }
