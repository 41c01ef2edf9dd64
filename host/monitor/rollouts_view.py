"""What the page shows of rollouts: their journals as JSON-ready tables."""

from collections import Counter
from pathlib import Path
from typing import Any

from device.contract.records import to_table
from host.monitor.rollout.engine import open_journals
from host.monitor.rollout.journal import Journal

SHOWN = 30
SHOWN_ENTRIES = 60


def rollouts_view(root: Path) -> list[dict[str, Any]]:
    """The newest rollouts, each with its newest entries first."""
    return [_view(journal) for journal in reversed(open_journals(root)[-SHOWN:])]


def _view(journal: Journal) -> dict[str, Any]:
    plan, progress = journal.plan, journal.progress
    return {
        "id": plan.id,
        "name": plan.name,
        "version": plan.version,
        "release": plan.release,
        "channel": plan.channel,
        "status": progress.status,
        "reason": progress.reason,
        "stage": progress.stage,
        "stages": [str(stage) for stage in plan.stages],
        "boards": Counter(board.state for board in progress.boards.values()),
        "entries": [to_table(entry) for entry in reversed(journal.entries()[-SHOWN_ENTRIES:])],
    }
