"""The store behind a small protocol: what ingest writes and the page reads.

A SQLite file or a PostgreSQL database; both pass the same tests. The rules every store keeps:

- A message is known by (device, boot, sequence), one counter over telemetry and events; a copy is only counted, also
  when the message itself is forgotten.
- A skipped number opens a gap, and the late message closes it, so "missing" is exact in any order of arrival.
- A will of an older boot never hides a newer birth.
- What cannot be read is kept in quarantine, bounded and counted.
- Telemetry is rolled up by minute and hour as it arrives, late or not (`aggregates.py`), and kept for so long as
  `retention.py` says; a span of time is read from the rows that `spans.py` chooses.
- Several processes may write, about the same devices too, where the database takes it: all of this stays exact.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from device.contract.messages import Event, Reply, Result, State, Telemetry
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.database import Database
from host.monitor.retention import Forgotten, Retention
from host.monitor.rows import DeviceRow, EventRow, Gap, Quarantined, Series


class Store(Protocol):
    """Safe to use from several threads; `received` is the arrival in Unix seconds.

    Recording raises ValueError where a message holds what JSON cannot (infinity), and MonitorError where the store
    cannot be written; nothing of the transaction is kept then.
    """

    identity: str  # stays with the stored data; names the ingest's session at the broker

    def transaction(self, devices: Iterable[DeviceId] = ()) -> AbstractContextManager[None]:
        """All records inside are committed together, on disk, or not at all; records outside commit one by one.

        A record that raises inside leaves no trace, and the others may go on. `devices` are those that the records are of,
        as far as known: several processes that tell them never wait for each other in a ring.
        """

    def record_state(self, device: DeviceId, state: State, *, received: float, retained: bool = False) -> None:
        """`retained`: the broker replayed it, so it proves nothing about when the device was last alive."""

    def record_telemetry(self, device: DeviceId, telemetry: Telemetry, *, received: float) -> bool:
        """Return False for a duplicate. MessageError if the number was used for another message that is still kept."""

    def record_event(self, device: DeviceId, event: Event, *, received: float) -> bool:
        """Like `record_telemetry`."""

    def record_reply(self, device: DeviceId, reply: Reply, *, received: float) -> None: ...

    def record_result(self, device: DeviceId, result: Result, *, received: float) -> None: ...

    def quarantine(
        self, topic: str, payload: bytes, reason: str, *, received: float, device: DeviceId | None = None
    ) -> None: ...

    def devices(self) -> list[DeviceRow]: ...

    def device(self, device: DeviceId) -> DeviceRow | None: ...

    def telemetry(
        self, device: DeviceId, names: tuple[str, ...], *, since: float, until: float, points: int = 600
    ) -> Series:
        """Timelines in `since..until` by the device's clock, at most about `points` long; a silence shows as None."""

    def class_mix(self, device: DeviceId, *, since: float, until: float) -> dict[str, float]:
        """Predictions per class index (as text) in `since..until`."""

    def events(self, device: DeviceId, *, limit: int = 100) -> list[EventRow]:
        """Newest first."""

    def events_since(self, received: float) -> list[tuple[DeviceId, EventRow]]:
        """What arrived from all devices since then, in order of arrival."""

    def reply(self, device: DeviceId, command: str) -> Reply | None:
        """A device's answer to the command of that id, if it came and is still kept."""

    def gaps(self, device: DeviceId, *, limit: int = 100) -> list[Gap]:
        """Newest first, closed ones included."""

    def quarantined(self, device: DeviceId | None = None, *, limit: int = 100) -> list[Quarantined]:
        """Newest first; of all devices and of unreadable topics if `device` is None."""

    def quarantined_total(self) -> int:
        """How many messages were ever quarantined, whether or not they are still kept."""

    def forget(self, retention: Retention, *, now: float, pause: Callable[[], bool] = lambda: False) -> Forgotten:
        """Delete what is older than `retention` allows; in short transactions, so that others may write meanwhile.

        `pause` is called after each; where it returns True, the rest is left for the next time.
        """

    def close(self) -> None: ...


def is_url(store: str | Path) -> bool:
    """Whether a store is named by the URL of a database, not by a file."""
    return str(store).startswith(("postgresql://", "postgres://"))


def open_store(store: str | Path) -> Store:
    """Open or create a store; it closes what it opened.

    Raises:
        MonitorError: a newer version wrote it, it is of something else, or it cannot be opened or reached.
    """
    from host.monitor.sql_store import SqlStore  # the implementation imports the protocol's rows, not the reverse

    return SqlStore(open_database(store))


def open_database(store: str | Path) -> Database:
    """What is under a store, for who copies all of it."""
    if "://" in str(store) and not is_url(store):
        raise MonitorError(
            f"store {str(store).rpartition('@')[2]!r}: expected a file, or postgresql://[USER@]HOST/DATABASE"
        )
    if not is_url(store):
        from host.monitor.sqlite_database import SqliteDatabase

        return SqliteDatabase(Path(store))
    try:
        from host.monitor.postgres_database import PostgresDatabase
    except ImportError as error:
        raise MonitorError(f"a PostgreSQL store needs psycopg ({error}); pip install 'fieldvit[postgres]'") from error
    return PostgresDatabase(str(store))
