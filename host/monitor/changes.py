"""What one transaction of the store has read and will write: each device, boot and rollup once, however many messages.

A batch of 200 messages is a dozen statements so, which counts where each is a round trip to a server. A device is locked
before it is read, so nobody else changes it until the commit. What is rare (a new boot, a gap) is written at once.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from device.contract.topics import DeviceId
from host.monitor.aggregates import Aggregate
from host.monitor.database import Database, Row
from host.monitor.spans import WIDTHS

ABSENT_INSERT = "INSERT INTO absent (boot_id, first, last) VALUES (?, ?, ?)"
ROLLUP_INSERT = "INSERT INTO rollup (device_id, width_s, start, received, names, numbers) VALUES (?, ?, ?, ?, ?, ?)"
_MESSAGE_INSERT = (
    "INSERT INTO message (device_id, boot_id, sequence, kind, time, received, body) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_DEVICE_COLUMNS = (
    *("boot_id", "status", "state", "last_seen", "latest", "latest_time", "recent"),
    *("received", "duplicates", "missing", "unwatched"),
)
_DEVICE_UPDATE = f"UPDATE device SET {', '.join(f'{name} = ?' for name in _DEVICE_COLUMNS)} WHERE id = ?"
_BOOT_UPDATE = "UPDATE boot SET highest = ?, superseded = ? WHERE id = ?"
_KEYS_AT_ONCE = 500
_INDEXED_LENGTH = 256

Record = dict[str, Any]
"""A row that may be changed."""


def storable(text: str) -> str:
    """`text`, or its SHA-256 where a database may refuse it as a key: surrogates, NUL, thousands of characters."""
    if len(text) <= _INDEXED_LENGTH and text.isprintable():
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def start_of(time: float, width_s: int) -> int:
    """Where the minute or hour of `time` begins."""
    return math.floor(time / width_s) * width_s


class Changes:
    """Begins empty with a transaction; `write` ends it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._locked: set[str] = set()
        self._devices: dict[DeviceId, Record] = {}
        self._boots: dict[tuple[int, str], Record] = {}
        self._changed: dict[int, Record] = {}  # devices
        self._messages: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._rollups: dict[tuple[int, int, int], tuple[float, Aggregate]] = {}

    def hold(self, devices: Iterable[DeviceId]) -> None:
        """Lock devices and read those that are known, with their newest boots."""
        wanted = sorted(set(devices) - self._devices.keys(), key=str)
        self.lock(*map(str, wanted))
        boots = []
        for part in _parts(wanted):
            keys = [(device.site, device.device) for device in part]
            for row in _rows_of(self._database, "device", ("site", "device"), keys):
                self._devices[DeviceId(row["site"], row["device"])] = dict(row)
                boots += [row["boot_id"]] if row["boot_id"] is not None else []
        for part in _parts(boots):
            marks = ", ".join("?" * len(part))
            for row in self._database.run(f"SELECT * FROM boot WHERE id IN ({marks})", *part):
                self._boots[row["device_id"], row["boot"]] = dict(row)

    def lock(self, *names: str) -> None:
        """Lock what is not locked yet."""
        new = [name for name in names if name not in self._locked]
        if new:
            self._database.lock(new)
            self._locked.update(new)

    def device(self, device: DeviceId, received: float) -> Record:
        """The device's row, made at its first message."""
        if str(device) not in self._locked:
            self.hold([device])
        if device not in self._devices:
            (row,) = self._database.run(
                "INSERT INTO device (site, device, first_seen, last_seen) VALUES (?, ?, ?, 0) RETURNING *",
                *(device.site, device.device, received),
            )
            self._devices[device] = dict(row)
        return self._devices[device]

    def boot(self, device_id: int, boot: str) -> Record:
        """The boot's row, made at its first message. Changes to it are written."""
        key = (device_id, boot)
        if key not in self._boots:
            rows = self._database.run("SELECT * FROM boot WHERE device_id = ? AND boot = ?", *key)
            rows = rows or self._database.run("INSERT INTO boot (device_id, boot) VALUES (?, ?) RETURNING *", *key)
            self._boots[key] = dict(rows[0])
        return self._boots[key]

    def boot_of(self, boot_id: int) -> Record:
        """The boot with this id."""
        for row in self._boots.values():
            if row["id"] == boot_id:
                return row
        (row,) = map(dict, self._database.run("SELECT * FROM boot WHERE id = ?", boot_id))
        return self._boots.setdefault((row["device_id"], row["boot"]), row)

    def change(self, row: Record, alive: float) -> None:
        """Write the device's row in the end, seen alive at that time."""
        row["last_seen"] = max(row["last_seen"], alive)
        self._changed[row["id"]] = row

    def message(self, boot_id: int, sequence: int) -> tuple[str, float, str] | None:
        """Kind, time and body of a message that has arrived; None where its row is forgotten."""
        pending = self._messages.get((boot_id, sequence))
        if pending is not None:
            return pending[3], pending[4], pending[6]
        rows = self._database.run(
            "SELECT kind, time, body FROM message WHERE boot_id = ? AND sequence = ?", boot_id, sequence
        )
        return (rows[0]["kind"], rows[0]["time"], rows[0]["body"]) if rows else None

    def insert(self, device_id: int, boot_id: int, sequence: int, *columns: Any) -> None:
        """Write a message: kind, time, received, body."""
        self._messages[boot_id, sequence] = (device_id, boot_id, sequence, *columns)

    def roll_up(self, device_id: int, time: float, values: dict[str, float], received: float) -> None:
        """Add a window to its minute and its hour."""
        window = Aggregate.of(time, values)
        for width_s in WIDTHS:
            key = (device_id, width_s, start_of(time, width_s))
            before = self._rollups.get(key)
            self._rollups[key] = (min(before[0], received), before[1].joined(window)) if before else (received, window)

    def write(self) -> None:
        """Write all that is not written yet."""
        self._database.run_many(_MESSAGE_INSERT, list(self._messages.values()))
        for part in _parts(sorted(self._rollups)):
            self._write_rollups(part)
        boots = [(row["highest"], row["superseded"], row["id"]) for row in self._boots.values()]
        self._database.run_many(_BOOT_UPDATE, boots)
        devices = [[row[name] for name in _DEVICE_COLUMNS] + [row["id"]] for row in self._changed.values()]
        self._database.run_many(_DEVICE_UPDATE, devices)

    def _write_rollups(self, keys: Sequence[tuple[int, int, int]]) -> None:
        names = ("device_id", "width_s", "start")
        there = {tuple(row[name] for name in names): row for row in _rows_of(self._database, "rollup", names, keys)}
        rows = []
        for key in keys:
            received, total = self._rollups[key]
            if key in there:
                total = Aggregate.load(there[key]["names"], there[key]["numbers"]).joined(total)
            rows.append((*key, received, total.names, total.numbers))
        change = "names = excluded.names, numbers = excluded.numbers"
        upsert = f"{ROLLUP_INSERT} ON CONFLICT (device_id, width_s, start) DO UPDATE SET {change}"
        self._database.run_many(upsert, rows)


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for i in range(0, len(items), _KEYS_AT_ONCE):
        yield items[i : i + _KEYS_AT_ONCE]


def _rows_of(database: Database, table: str, names: Sequence[str], keys: Sequence[Sequence[Any]]) -> list[Row]:
    """The rows with these keys of several columns. SQLite reads a whole table for `(…) IN (VALUES …)`, but joins by index."""
    mark = f"({', '.join('?' * len(names))})"
    return database.run(
        f"WITH wanted ({', '.join(names)}) AS (VALUES {', '.join([mark] * len(keys))})"
        f" SELECT {table}.* FROM wanted CROSS JOIN {table}"
        f" WHERE {' AND '.join(f'{table}.{name} = wanted.{name}' for name in names)}",
        *(value for key in keys for value in key),
    )
