"""Carries rollouts on: looks at the boards, writes down what is next, does it. Runs wherever the store is.

All that it knows is in the store and in the journals, so it may be killed at any moment and started again elsewhere. What
is written down but may not have been sent is sent again; boards obey a command's id once.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device.contract.errors import BrokerError
from device.contract.messages import Command
from device.contract.topics import DeviceId
from host.errors import FleetError, MonitorError
from host.monitor.rollout.decide import decide
from host.monitor.rollout.journal import PLAN, Entry, Journal, Progress, parse_device
from host.monitor.rollout.plan import Plan
from host.monitor.rollout.sight import Sight, look
from host.monitor.store import Store

LOOK_S = 2.0
ORDERS = {"asked": "update", "revert": "rollback"}

Order = tuple[DeviceId, Command]
Send = Callable[[Iterable[Order]], None]
"""Hands commands to the broker; BrokerError where it takes none."""

log = logging.getLogger(__name__)


class Engine:
    """Works on the rollouts of one directory.

    Args:
        root: has one directory for each rollout.
        store: what the boards said.
        send: gives commands to the broker.
        clock: Unix seconds.
    """

    def __init__(self, root: Path, store: Store, send: Send, *, clock: Callable[[], float] = time.time) -> None:
        self._root, self._store, self._send, self._clock = root, store, send, clock
        self._journals: dict[str, Journal] = {}
        self._unsent: dict[str, Order] = {}  # by command id

    def run(self, stop: threading.Event) -> None:
        """Look every few seconds until `stop`; what goes wrong is logged, and tried again."""
        while not stop.wait(LOOK_S):
            self.step()

    def step(self) -> None:
        """One look at every rollout; the trouble of one does not keep the others from going on."""
        for directory in _directories(self._root):
            with _logged(f"rollout {directory.name}"):
                self._look_at(directory)
        with _logged("rollouts"):
            self._send_unsent()

    def _look_at(self, directory: Path) -> None:
        journal = self._journals.get(directory.name) or self._opened(directory)
        journal.refresh()
        if not is_over(journal.progress, now=self._clock()):
            self._step(journal)

    def _opened(self, directory: Path) -> Journal:
        journal = self._journals[directory.name] = Journal(directory)
        for name, board in journal.progress.boards.items():  # perhaps written down, and never sent
            if board.state in ORDERS and board.expires > self._clock():
                self._note(journal.plan, name, board.state, board.command, board.expires)
        return journal

    def _step(self, journal: Journal) -> None:
        now, plan = self._clock(), journal.plan
        sights = self._look(plan, journal.progress, now)
        for entry in decide(plan, journal.progress, sights, now=now):
            journal.append(entry)
            log.info("rollout %s: %s", plan.id, words(entry))
            if entry.kind in ORDERS:
                self._note(plan, entry.device, entry.kind, entry.command, entry.expires)

    def _look(self, plan: Plan, progress: Progress, now: float) -> dict[DeviceId, Sight]:
        return {
            row.device: look(self._store, plan, row, progress.boards.get(str(row.device)), now=now)
            for row in self._store.devices()
            if plan.is_meant(row.device)
        }

    def _note(self, plan: Plan, device: str, kind: str, command_id: str, expires: float) -> None:
        arguments = {"channel": plan.channel} | ({"accept_loss": True} if plan.accept_loss else {})
        command = Command(
            id=command_id, verb=ORDERS[kind], expires=expires, arguments=arguments if kind == "asked" else {}
        )
        self._unsent[command_id] = (parse_device(device), command)

    def _send_unsent(self) -> None:
        if self._unsent:
            self._send(list(self._unsent.values()))
            self._unsent.clear()


@contextmanager
def _logged(name: str) -> Iterator[None]:
    """What goes wrong inside is logged, and tried again at the next look."""
    try:
        yield
    except (FleetError, MonitorError, BrokerError) as error:
        log.error("%s: %s", name, error)
    except Exception:  # what a part did not foresee must not end the monitor
        log.exception("%s: unexpected error; going on", name)


def open_journals(root: Path) -> list[Journal]:
    """All rollouts, oldest first; one that is damaged is left out, and logged."""
    journals = []
    for directory in _directories(root):
        with _logged(f"rollout {directory.name}"):
            journals.append(Journal(directory))
    return sorted(journals, key=lambda journal: journal.plan.created)


def _directories(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"*/{PLAN}"))


def is_over(progress: Progress, *, now: float) -> bool:
    """Whether nothing can come any more: finished, or aborted with every board known to be back."""
    if progress.status == "aborted":
        is_open = any(
            board.state in ("revert", "confirmed", "done", "failed") or (board.state == "asked" and board.expires > now)
            for board in progress.boards.values()
        )
        return not is_open
    return progress.status == "finished"


def words(entry: Entry) -> str:
    """One line about an entry."""
    what = f"stage {entry.stage + 1}" if entry.kind == "stage" else entry.kind
    why = ": ".join(part for part in (entry.reason, entry.detail) if part)
    parts = [entry.device, what, f"({why})" if why else "", f"by {entry.by}" if entry.by else ""]
    return " ".join(part for part in parts if part)
