"""How long a store keeps what boards said, by arrival here: wrong clocks of boards make nothing stay or go.

A telemetry message is kept as it came for a week, its minute for a month and its hour for two years; events stay as long as
hours. Boots and their gaps stay for ever, so that copies of forgotten messages are known; they are small. At one window a
minute of 1 kB a board takes about 10 MB for its week.
"""

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.database import Database, Row
from host.monitor.spans import HOUR, MINUTE

logger = logging.getLogger(__name__)

DAY_S = 86400.0
EVERY_S = 600.0
"""Between two rounds of forgetting."""
PAUSE_S = 0.02
"""Between two of its transactions: a lock that is taken again at once is taken from nobody who waits."""
_ROWS_AT_ONCE = 2000  # of one commit, so that ingest waits for milliseconds
_OLD_MESSAGES = (
    "SELECT message.device_id, message.boot_id, sequence, time AS until, site, device.device"
    " FROM message JOIN device ON device.id = message.device_id"
    " WHERE kind {} 'telemetry' AND message.received < ? ORDER BY message.received LIMIT ?"
)
_OLD_ROLLUPS = (
    "SELECT device_id, width_s, start, start + width_s AS until, site, device.device"
    " FROM rollup JOIN device ON device.id = device_id"
    " WHERE width_s = {} AND rollup.received < ? ORDER BY rollup.received LIMIT ?"
)
_DELETE_MESSAGE = "DELETE FROM message WHERE boot_id = ? AND sequence = ?"
_DELETE_ROLLUP = "DELETE FROM rollup WHERE device_id = ? AND width_s = ? AND start = ?"
_KEPT_SINCE = "UPDATE device SET {0} = CASE WHEN {0} < ? THEN ? ELSE {0} END WHERE id = ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Days from arrival on; each coarser kind is kept at least as long as the finer one."""

    telemetry_days: float = 7.0
    minutes_days: float = 31.0
    hours_days: float = 730.0

    def __post_init__(self) -> None:
        days = [(field.name.removesuffix("_days"), getattr(self, field.name)) for field in fields(self)]
        for name, value in days:
            if not 0 < value < math.inf:
                raise MonitorError(f"keep-{name}: must be more than 0 days, got {value:g}")
        for (finer, shorter), (coarser, longer) in itertools.pairwise(days):
            if shorter > longer:
                raise MonitorError(
                    f"keep-{finer}: {shorter:g} days is longer than the {longer:g} of keep-{coarser}; raise the latter"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """How many rows of each kind one round deleted."""

    telemetry: int = 0
    events: int = 0
    minutes: int = 0
    hours: int = 0


@dataclass(frozen=True, slots=True)
class _Kind:
    """Rows of one kind: how old ones are found and deleted, and what tells the reader from when on all are there."""

    find: str
    delete: str
    key: tuple[str, ...]
    kept_since: str | None = None


_MESSAGE, _ROLLUP = ("boot_id", "sequence"), ("device_id", "width_s", "start")
_TELEMETRY = _Kind(_OLD_MESSAGES.format("="), _DELETE_MESSAGE, _MESSAGE, "telemetry_since")
_EVENTS = _Kind(_OLD_MESSAGES.format("!="), _DELETE_MESSAGE, _MESSAGE)
_MINUTES = _Kind(_OLD_ROLLUPS.format(MINUTE), _DELETE_ROLLUP, _ROLLUP, "minutes_since")
_HOURS = _Kind(_OLD_ROLLUPS.format(HOUR), _DELETE_ROLLUP, _ROLLUP)


def forget(database: Database, retention: Retention, *, now: float, pause: Callable[[], bool]) -> Forgotten:
    """Delete what is older than `retention` allows, in short transactions.

    `pause` is called after each, so that others may write; where it returns True, the rest is left for the next round.
    """
    hours_s = retention.hours_days * DAY_S
    return Forgotten(
        telemetry=_forget(database, _TELEMETRY, now - retention.telemetry_days * DAY_S, pause),
        events=_forget(database, _EVENTS, now - hours_s, pause),
        minutes=_forget(database, _MINUTES, now - retention.minutes_days * DAY_S, pause),
        hours=_forget(database, _HOURS, now - hours_s, pause),
    )


@contextmanager
def forgetting(forget_now: Callable[[Callable[[], bool]], Forgotten], *, every_s: float = EVERY_S) -> Iterator[None]:
    """Forget in a thread of its own, at once and then every so often, until the block ends.

    `forget_now` is told the `pause` of `forget`.
    """
    stop = threading.Event()

    def work() -> None:
        while True:
            try:
                forgotten = forget_now(lambda: stop.wait(PAUSE_S))
            except MonitorError:
                logger.exception("nothing forgotten; trying again in %g s", every_s)
            else:
                if forgotten != Forgotten():
                    logger.info("%s", forgotten)
            if stop.wait(every_s):
                return

    thread = threading.Thread(target=work, name="retention", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _forget(database: Database, kind: _Kind, before: float, pause: Callable[[], bool]) -> int:
    total = 0
    while True:
        with database.transaction():
            rows = database.run(kind.find, before, _ROWS_AT_ONCE)
            if rows:
                _delete(database, kind, rows)
        if rows:
            database.tidy()
        total += len(rows)
        if pause() or len(rows) < _ROWS_AT_ONCE:
            return total


def _delete(database: Database, kind: _Kind, rows: list[Row]) -> None:
    database.lock(sorted({str(DeviceId(row["site"], row["device"])) for row in rows}))
    database.run_many(kind.delete, [[row[name] for name in kind.key] for row in rows])
    if kind.kept_since is None:
        return
    until: dict[int, float] = {}
    for row in rows:
        until[row["device_id"]] = max(row["until"], until.get(row["device_id"], -math.inf))
    since = [(math.nextafter(time, math.inf), device_id) for device_id, time in sorted(until.items())]
    database.run_many(_KEPT_SINCE.format(kind.kept_since), [(time, time, device_id) for time, device_id in since])
