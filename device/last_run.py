"""How the agent's last run ended: `ROOT/running` is there while it runs, and goes when it stops in good order.

The file holds the kernel's boot id. With the same id the agent died (killed, crashed, out of memory, hung); with another
one the board lost power or was restarted, which says nothing about the model. It is not synced: what a power cut loses of
it is a file that would have been ignored.
"""

import json
import logging
import os
from pathlib import Path

NAME = "running"

log = logging.getLogger(__name__)


def begin_run(root: Path, *, detail: str = "") -> None:
    """Say that the agent runs; `detail` is what to say if it does not stop in good order."""
    partial = root / f"{NAME}.tmp"
    try:
        partial.write_text(json.dumps({"boot": kernel_boot_id(), "pid": os.getpid(), "detail": detail}))
        os.replace(partial, root / NAME)
    except OSError as error:  # a full disk: a crash will not be counted, which is the safe side
        log.warning("%s cannot be written: %s", root / NAME, error)


def end_run(root: Path) -> None:
    """Say that the agent stops in good order."""
    try:
        (root / NAME).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", root / NAME, error)


def last_crash(root: Path) -> str:
    """How the agent before this one died; "" when it stopped in good order, or the board was restarted since."""
    try:
        table = json.loads((root / NAME).read_bytes())
        is_same_boot = table["boot"] == kernel_boot_id()
        return str(table["detail"] or f"process {table['pid']} ended without a word") if is_same_boot else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def kernel_boot_id() -> str:
    """A new one at each start of the system; "" where there is none (macOS)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
