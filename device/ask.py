"""Ask the agent that runs on this board to look for an update, and wait for its verdict."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device.contract.errors import AgentBusyError, DeviceError, UpdateRefusedError
from device.journal import Entry
from device.slots import NAMES, Slots

PATIENCE_S = 1800.0
"""A slow source, a self-test of every candidate, and the soak of the slowest board profile."""
POLL_S = 0.2


def ask_for_update(
    root: Path, pid: int, *, patience_s: float = PATIENCE_S, tell: Callable[[str], None] = lambda _: None
) -> bool:
    """Have a running agent take what its channel offers; returns whether something new was confirmed.

    Args:
        root: the data directory.
        pid: the agent's process.
        patience_s: how long the verdict may take.
        tell: gets a line when something goes on.

    Raises:
        UpdateRefusedError: it was refused, or taken back on probation; with the reason.
        AgentBusyError: the agent belongs to somebody else.
        DeviceError: no verdict in time, or the agent ended.
    """
    deadline = time.monotonic() + patience_s
    before, mark = _checks(root, pid), Slots(root).last_number
    try:
        os.kill(pid, signal.SIGHUP)
    except PermissionError as error:
        raise AgentBusyError(
            f"{root}: its agent (process {pid}) runs as another user; be that user, or send it a command over MQTT"
        ) from error
    tell(f"the agent (process {pid}) looks for an update")
    _wait(lambda: _checks(root, pid) > before, pid, deadline)
    check = _agent_table(root, pid).get("last_check", {})
    if check.get("outcome") == "refused":
        raise UpdateRefusedError(str(check.get("reason")), str(check.get("detail")))
    if testing := _testing(root):
        tell(f"{testing.name} {testing.version} {testing.precision} serves on probation in slot {testing.slot}")
    _wait(lambda: _testing(root) is None, pid, deadline)
    return _verdict(Slots(root).history(after=mark))


def _verdict(entries: list[Entry]) -> bool:
    for entry in entries:
        if entry.state == "rejected" and entry.was == "testing":
            raise UpdateRefusedError(
                entry.reason, f"{entry.name} {entry.version} was taken back ({entry.reason}): {entry.detail}"
            )
    return any(entry.state == "confirmed" and entry.was == "testing" for entry in entries)


def _testing(root: Path) -> Entry | None:
    slots = Slots(root)
    return next((entry for slot in NAMES if (entry := slots.state(slot)).state == "testing"), None)


def _checks(root: Path, pid: int) -> int:
    return int(_agent_table(root, pid).get("last_check", {}).get("number", 0))


def _agent_table(root: Path, pid: int) -> dict[str, Any]:
    try:
        table = json.loads((root / "agent.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) and table.get("pid") == pid else {}


def _wait(is_true: Callable[[], bool], pid: int, deadline: float) -> None:
    while not is_true():
        if time.monotonic() > deadline:
            raise DeviceError(
                f"the agent (process {pid}) gave no verdict in time; see 'fieldvit-device status --history'"
            )
        if not _is_alive(pid):
            raise DeviceError(f"the agent (process {pid}) ended meanwhile; see its log, and start it again")
        time.sleep(POLL_S)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
