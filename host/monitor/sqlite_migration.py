"""Takes over a SQLite store of schema 1, which had neither rollups nor ranges of absent numbers, in the caller's transaction.

Its tables are set aside, copied into the new ones, and what schema 2 adds is made from the rows. While it lasts the file
grows by what it held.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import groupby

from host.monitor.aggregates import Aggregate, put_together
from host.monitor.changes import ABSENT_INSERT, ROLLUP_INSERT, start_of, storable
from host.monitor.spans import WIDTHS

_TABLES = ("meta", "device", "boot", "message", "gap", "reply", "result", "quarantine", "quarantine_count")
_INDEXES = ("telemetry_by_time", "event_by_time", "gap_by_boot", "gap_by_device", "result_by_device")
_MISSING = "(SELECT total(missing) FROM old_gap WHERE device_id = old_device.id AND watched = {} AND missing > 0)"
_COPIES = {
    "device": (
        "INSERT INTO device (id, site, device, boot_id, status, state, first_seen, last_seen, latest, latest_time,"
        " recent, received, duplicates, missing, unwatched)"
        " SELECT id, site, device, boot_id, status, state, first_seen, last_seen, latest, latest_time,"
        f" recent, received, duplicates, {_MISSING.format(1)}, {_MISSING.format(0)} FROM old_device"
    ),
    "message": (
        "INSERT INTO message SELECT device_id, boot_id, sequence, kind, time, received, body FROM old_message"
        " ORDER BY id"
    ),
    "reply": (
        "INSERT INTO reply (device_id, command, received, body)"
        " SELECT device_id, storable(command), received, body FROM old_reply ORDER BY rowid"
    ),
}


def migrate(connection: sqlite3.Connection, statements: Sequence[str]) -> None:
    """Replace the tables of schema 1 by those that `statements` make."""
    connection.create_function("storable", 1, storable, deterministic=True)
    for name in _INDEXES:
        connection.execute(f"DROP INDEX {name}")
    for name in _TABLES:
        connection.execute(f"ALTER TABLE {name} RENAME TO old_{name}")
    for statement in statements:
        connection.execute(statement)
    for name in _TABLES:
        connection.execute(_COPIES.get(name, f"INSERT INTO {name} SELECT * FROM old_{name}"))
    for name in _TABLES:
        connection.execute(f"DROP TABLE old_{name}")
    connection.executemany(ABSENT_INSERT, _absent(connection))
    for width_s in WIDTHS:
        connection.executemany(ROLLUP_INSERT, _rollups(connection, width_s))


def _absent(connection: sqlite3.Connection) -> Iterator[tuple[int, int, int]]:
    """What lies in the open gaps of each boot between the numbers that are there."""
    for gap in connection.execute("SELECT boot_id, first, last FROM gap WHERE missing > 0"):
        arrived = connection.execute(
            "SELECT sequence FROM message WHERE boot_id = ? AND sequence BETWEEN ? AND ? ORDER BY sequence", tuple(gap)
        )
        boot_id, first, last = gap
        for (sequence,) in arrived:
            if first < sequence:
                yield boot_id, first, sequence - 1
            first = sequence + 1
        if first <= last:
            yield boot_id, first, last


def _rollups(connection: sqlite3.Connection, width_s: int) -> Iterator[tuple[int, int, int, float, str, bytes]]:
    """All rollups of one width, one after the other, so that a large store needs no large memory."""
    rows = connection.execute(
        "SELECT device_id, time, received, body FROM message WHERE kind = 'telemetry' ORDER BY device_id, time"
    )
    for (device_id, start), messages in groupby(rows, lambda row: (row["device_id"], start_of(row["time"], width_s))):
        windows = [(row["received"], Aggregate.of(row["time"], json.loads(row["body"]))) for row in messages]
        total = put_together(window for _, window in windows)
        yield device_id, width_s, start, min(received for received, _ in windows), total.names, total.numbers
