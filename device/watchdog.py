"""Notices that a thread hangs, and gets the process restarted.

The watchdog's thread looks at the hearts: how long the frame loop has been silent, how long a worker has been at one job.
While all are within their limits it tells the supervisor so (`WATCHDOG=1`). When one is not, it says which, writes all
stacks to standard error, and is silent from then on: systemd then kills and restarts the agent. Without a supervisor that
listens it ends the process itself with `HANG_EXIT_CODE`, for whatever restarts it. Either way the start is counted.

A thread that hangs inside C code may hold the interpreter's lock, and the watchdog's own thread with it. `faulthandler`
waits in a thread that needs no lock; it is wound up anew at each look and ends the process when that stops.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping

from device.contract.record import record
from device.notify import Notifier

HANG_EXIT_CODE = 12
FROZEN_S = 60.0
"""How long this very thread may not come to run: the interpreter's lock is held."""

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Heart:
    """One thread: seconds since its last sign of life, and how many are allowed."""

    silence_s: Callable[[], float]
    limit_s: float


class Pulse:
    """A sign of life, given by one thread and read by another."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def beat(self, *, grace_s: float = 0.0) -> None:
        """Be alive now, and for `grace_s` seconds more whatever happens: something long is about to begin."""
        self._last = self._clock() + grace_s

    def silence_s(self) -> float:
        return max(self._clock() - self._last, 0.0)


class Watchdog:
    """Watches hearts in a thread of its own.

    Args:
        hearts: by name.
        notifier: told at each look that all is well.
        supervisor_s: how long the supervisor waits for that; 0: there is none that listens, so end the process here.
        on_hang: gets the name and the seconds of a heart that stopped, before the process ends; it must not wait long.
        end: ends the process.
    """

    def __init__(
        self,
        hearts: Mapping[str, Heart],
        *,
        notifier: Notifier,
        supervisor_s: float,
        on_hang: Callable[[str, float], None],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._hearts, self._notifier, self._supervisor_s = hearts, notifier, supervisor_s
        self._on_hang, self._end = on_hang, end
        limits = [heart.limit_s for heart in hearts.values()] + ([supervisor_s] if supervisor_s else [])
        self._interval_s = max(min(limits) / 4, 0.01)
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        _wind_up()
        self.thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._interval_s):
                _wind_up()
                if stopped := self._stopped():
                    self._bite(*stopped)
                    return
                self._notifier.beat()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _stopped(self) -> tuple[str, float] | None:
        for name, heart in self._hearts.items():
            silence_s = heart.silence_s()
            if silence_s > heart.limit_s:
                return name, silence_s
        return None

    def _bite(self, name: str, silence_s: float) -> None:
        limit_s = self._hearts[name].limit_s
        log.critical("%s has given no sign of life for %.0f s, %.0f are allowed", name, silence_s, limit_s)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        try:
            self._on_hang(name, silence_s)
        except Exception:  # whatever stops the report must not stop the end
            log.exception("the hang could not be recorded")
        self._notifier.status(f"{name} hangs")
        if self._supervisor_s and not self._stop.wait(2 * self._supervisor_s):
            log.critical("the supervisor did not end this process; it ends itself")
        if not self._stop.is_set():
            self._end(HANG_EXIT_CODE)


def _wind_up() -> None:
    stream = sys.__stderr__
    if stream is not None and not stream.closed:
        faulthandler.dump_traceback_later(FROZEN_S, exit=True, file=stream)
