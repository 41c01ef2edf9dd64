"""The store behind a small protocol: what ingest writes and the page reads.

SQLite is the one implementation so far; a second one passes the same tests. The rules every store keeps:

- A message is known by (device, boot, sequence), one counter over telemetry and events; a copy is only counted.
- A skipped number opens a gap, and the late message closes it, so "missing" is exact in any order of arrival.
- A will of an older boot never hides a newer birth.
- What cannot be read is kept in quarantine, bounded and counted.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from device.contract.messages import Event, Reply, Result, State, Telemetry
from device.contract.topics import DeviceId
from host.monitor.rows import DeviceRow, EventRow, Gap, Quarantined, Series


class Store(Protocol):
    """Safe to use from several threads; `received` is the arrival in Unix seconds.

    Recording raises ValueError where a message holds what JSON cannot (infinity), and MonitorError where the store
    cannot be written; nothing of the transaction is kept then.
    """

    identity: str  # stays with the stored data; names the ingest's session at the broker

    def transaction(self) -> AbstractContextManager[None]:
        """All records inside are committed together, on disk, or not at all; records outside commit one by one.

        A record that raises inside leaves no trace, and the others may go on.
        """

    def record_state(self, device: DeviceId, state: State, *, received: float, retained: bool = False) -> None:
        """`retained`: the broker replayed it, so it proves nothing about when the device was last alive."""

    def record_telemetry(self, device: DeviceId, telemetry: Telemetry, *, received: float) -> bool:
        """Return False for a duplicate. MessageError if the number was already used for another message."""

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
        """Timelines in `since..until` by the device's clock, thinned to about `points`; a silence shows as None."""

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

    def close(self) -> None: ...


def open_store(path: Path) -> Store:
    """Open or create the store at `path`; MonitorError if a newer version wrote it or it is no store."""
    from host.monitor.sqlite_store import SqliteStore  # the implementation imports the protocol's rows, not the reverse

    return SqliteStore(path)
