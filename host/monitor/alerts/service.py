"""Looks at the fleet every few seconds and tells what is to be told. Runs in `fieldvit monitor`.

What fires, and what somebody has heard of it, is in one file beside the store, so a restart tells nothing twice and
forgets nothing. A webhook that does not answer is tried again, ever more slowly; what it missed goes along then.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from device.contract.files import write_atomic
from device.contract.topics import DeviceId
from host.errors import HostError, MonitorError
from host.monitor.alerts.conditions import Expiry, conditions
from host.monitor.alerts.rules import AlertConfig
from host.monitor.alerts.tracker import Notice, Tracker
from host.monitor.alerts.webhook import post
from host.monitor.rows import EventRow
from host.monitor.store import Store

LOOK_S = 5.0
OVERLAP_S = 30.0
"""Looked at again: a message that arrived earlier may be stored later."""
RETRY_S = (5.0, 300.0)
KEPT_NOTICES = 100

log = logging.getLogger(__name__)


class AlertService:
    """Alerts of one monitor.

    Args:
        store: what the boards said.
        config: the rules.
        path: where the state is kept.
        folder: where a relative `token_file` starts.
        expiries: the certificates that are known here.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: Store,
        config: AlertConfig,
        path: Path,
        *,
        folder: Path = Path(),
        expiries: Callable[[], Iterable[Expiry]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._config, self._path, self._clock, self._expiries = store, config, path, clock, expiries
        self._token_file = folder / config.token_file if config.token_file else None
        self._tracker = Tracker(config)
        self._lock = threading.Lock()
        self._notices: list[dict[str, Any]] = []
        self._mark = clock()
        self._known: set[tuple[DeviceId, str, int]] = set()
        self._saved = ""
        self._failures, self._next_try = 0, 0.0
        self._restore()

    def run(self, stop: threading.Event) -> None:
        """Look until `stop`; what goes wrong is logged, and tried again."""
        while not stop.wait(LOOK_S):
            try:
                self.step()
            except HostError as error:
                log.error("%s", error)
            except Exception:  # alerts must outlive what nobody foresaw
                log.exception("alerts: unexpected error; going on")

    def step(self) -> None:
        """One look."""
        now = self._clock()
        held = conditions(self._config.rule, self._store.devices(), self._new_events(now), self._expiries(), now=now)
        with self._lock:
            notices = self._tracker.look(held, now=now)
        try:
            for notice in notices:
                self._tell(notice)
        finally:
            self._save()

    def view(self) -> dict[str, Any]:
        """What the page shows: what fires, and what was told lately."""
        with self._lock:
            firing = [
                {"rule": rule, "board": board, "since": alert.since, "text": alert.text}
                for (rule, board), alert in self._tracker.alerts.items()
                if alert.is_firing
            ]
            severities = {rule.name: rule.severity for rule in self._config.rule}
            return {"firing": firing, "notices": self._notices[::-1], "severities": severities}

    def firing(self) -> dict[str, int]:
        """How many boards each rule fires for, for metrics."""
        with self._lock:
            return self._tracker.firing()

    def _new_events(self, now: float) -> list[tuple[DeviceId, EventRow]]:
        window = {
            (device, row.event.boot, row.event.sequence): (device, row)
            for device, row in self._store.events_since(self._mark - OVERLAP_S)
        }
        new = [found for key, found in window.items() if key not in self._known]
        self._known, self._mark = set(window), now
        return new

    def _tell(self, notice: Notice) -> None:
        if self._config.webhook:
            if self._clock() < self._next_try:
                return
            try:
                post(self._config.webhook, notice, token_file=self._token_file)
            except MonitorError:
                pause_s = min(RETRY_S[0] * 2**self._failures, RETRY_S[1])
                self._failures, self._next_try = self._failures + 1, self._clock() + pause_s
                raise
            self._failures, self._next_try = 0, 0.0
        with self._lock:
            self._tracker.told(notice)
            self._notices = [*self._notices, _shown(notice)][-KEPT_NOTICES:]
        log.warning("alert %s %s: %s", notice.rule.name, notice.kind, notice.text)

    def _save(self) -> None:
        state = json.dumps({"tracker": self._tracker.state(), "notices": self._notices, "mark": self._mark})
        if state == self._saved:
            return
        try:
            write_atomic(self._path, state.encode())
        except OSError as error:
            raise MonitorError(f"{self._path}: cannot be written ({error}); make room, or check the disk") from error
        self._saved = state

    def _restore(self) -> None:
        try:
            table = json.loads(self._path.read_bytes())
            self._tracker.restore(table["tracker"])
            self._notices, self._mark = list(table["notices"]), float(table["mark"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s: cannot be used (%s); what fires is told anew", self._path, error)


def _shown(notice: Notice) -> dict[str, Any]:
    return {
        "time": notice.time,
        "rule": notice.rule.name,
        "severity": notice.rule.severity,
        "kind": notice.kind,
        "count": len(notice.boards),
        "text": notice.text,
    }
