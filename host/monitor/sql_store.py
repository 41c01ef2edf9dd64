"""The store in a SQL database, whichever: the rules are in `store.py`, the tables in `schema.py`."""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from device.contract.errors import MessageError
from device.contract.messages import MAX_SEQUENCE, Event, Reply, Result, State, Telemetry
from device.contract.records import to_table
from device.contract.topics import DeviceId
from host.monitor.changes import ABSENT_INSERT, Changes, Record, storable
from host.monitor.database import Database
from host.monitor.retention import Forgotten, Retention, forget
from host.monitor.sql_queries import SqlQueries

RECENT_WINDOWS = 32  # points of the fleet page's latency sparkline
KEPT_PER_DEVICE = 200  # results and replies
KEPT_QUARANTINED = 100  # per device; unreadable topics share one such allowance
KEPT_PAYLOAD_BYTES = 4096


class SqlStore(SqlQueries):
    """A record first reads and checks, then writes: one that raises has changed nothing of its transaction."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._database = database
        self.identity = database.identity
        self._write_lock = threading.RLock()
        self._changes: Changes | None = None

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def transaction(self, devices: Iterable[DeviceId] = ()) -> Iterator[None]:
        with self._write_lock, self._changing() as changes:
            changes.hold(devices)
            yield

    @contextmanager
    def _changing(self) -> Iterator[Changes]:
        """The changes of the transaction under way, or of a new one."""
        with self._write_lock:
            if self._changes is not None:
                yield self._changes
                return
            try:
                with self._database.transaction():
                    self._changes = Changes(self._database)
                    yield self._changes
                    self._changes.write()
            finally:
                self._changes = None

    def record_state(self, device: DeviceId, state: State, *, received: float, retained: bool = False) -> None:
        alive = received
        if state.status == "offline" or retained:
            alive = min(received, state.time) if state.time is not None else 0.0
        said = _dump(to_table(state))
        with self._changing() as changes:
            row = changes.device(device, received)
            boot = changes.boot(row["id"], state.boot)
            changes.change(row, alive)
            if boot["superseded"]:
                return
            if state.status == "online":
                if row["boot_id"] not in (None, boot["id"]):
                    changes.boot_of(row["boot_id"])["superseded"] = 1
                row |= {"status": "online", "boot_id": boot["id"], "state": said}
            elif row["boot_id"] in (None, boot["id"]):  # the birth says more than the will
                row |= {"status": "offline", "boot_id": boot["id"], "state": row["state"] or said}

    def record_telemetry(self, device: DeviceId, telemetry: Telemetry, *, received: float) -> bool:
        body = _dump(telemetry.values)
        _check_number(telemetry, "telemetry")
        with self._changing() as changes:
            row = changes.device(device, received)
            if not _record_message(self._database, changes, row, "telemetry", telemetry, body, received):
                return False
            changes.roll_up(row["id"], telemetry.time, telemetry.values, received)
            if row["latest_time"] is None or telemetry.time >= row["latest_time"]:
                row |= {"latest": body, "latest_time": telemetry.time}
                if "latency/p50" in telemetry.values:
                    recent = [*json.loads(row["recent"]), telemetry.values["latency/p50"]]
                    row["recent"] = json.dumps(recent[-RECENT_WINDOWS:])
            return True

    def record_event(self, device: DeviceId, event: Event, *, received: float) -> bool:
        body = _dump(event.data)
        _check_number(event, event.kind)
        with self._changing() as changes:
            row = changes.device(device, received)
            return _record_message(self._database, changes, row, event.kind, event, body, received)

    def record_reply(self, device: DeviceId, reply: Reply, *, received: float) -> None:
        body = _dump(to_table(reply))
        with self._changing() as changes:
            row = changes.device(device, received)
            changes.change(row, received)
            self._database.run(
                "INSERT INTO reply (device_id, command, received, body) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (device_id, command) DO NOTHING",
                *(row["id"], storable(reply.id), received, body),
            )
            self._keep_newest("reply", "device_id = ?", (row["id"],), KEPT_PER_DEVICE)

    def record_result(self, device: DeviceId, result: Result, *, received: float) -> None:
        body = _dump(to_table(result))
        with self._changing() as changes:
            row = changes.device(device, received)
            changes.change(row, received)
            self._database.run(
                "INSERT INTO result (device_id, received, body) VALUES (?, ?, ?)", row["id"], received, body
            )
            self._keep_newest("result", "device_id = ?", (row["id"],), KEPT_PER_DEVICE)

    def quarantine(
        self, topic: str, payload: bytes, reason: str, *, received: float, device: DeviceId | None = None
    ) -> None:
        owner = (device.site, device.device) if device else ("", "")
        topic, reason = _printable(topic, 512), _printable(reason, 512)
        digest = hashlib.sha256(payload).hexdigest()
        with self._changing() as changes:
            changes.lock(str(device) if device else "")
            self._database.run(
                "INSERT INTO quarantine"
                " (site, device, topic, digest, reason, payload, payload_bytes, first_seen, last_seen, seen)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1) ON CONFLICT (topic, digest)"
                " DO UPDATE SET seen = quarantine.seen + 1, last_seen = excluded.last_seen",
                *(*owner, topic, digest, reason, payload[:KEPT_PAYLOAD_BYTES], len(payload), received, received),
            )
            self._database.run(
                "INSERT INTO quarantine_count VALUES (?, ?, 1)"
                " ON CONFLICT (site, device) DO UPDATE SET count = quarantine_count.count + 1",
                *owner,
            )
            self._keep_newest("quarantine", "site = ? AND device = ?", owner, KEPT_QUARANTINED)

    def forget(self, retention: Retention, *, now: float, pause: Callable[[], bool] = lambda: False) -> Forgotten:
        return forget(self._database, retention, now=now, pause=pause)

    def _keep_newest(self, table: str, where: str, values: tuple[Any, ...], limit: int) -> None:
        self._database.run(
            f"DELETE FROM {table} WHERE {where}"
            f" AND id <= (SELECT id FROM {table} WHERE {where} ORDER BY id DESC LIMIT 1 OFFSET ?)",
            *(*values, *values, limit),
        )


def _check_number(message: Telemetry | Event, kind: str) -> None:
    if not (math.isfinite(message.time) and 1 <= message.sequence <= MAX_SEQUENCE):
        raise MessageError(f"{kind}: sequence {message.sequence} at time {message.time} cannot be stored")


def _record_message(
    database: Database,
    changes: Changes,
    row: Record,
    kind: str,
    message: Telemetry | Event,
    body: str,
    received: float,
) -> bool:
    """Take a message that is new, or count a copy."""
    boot = changes.boot(row["id"], message.boot)
    sequence = message.sequence
    is_new = sequence > boot["highest"]
    if not is_new and not _arrive_late(database, row, boot["id"], sequence, received):
        kept = changes.message(boot["id"], sequence)
        if kept not in (None, (kind, message.time, body)):
            raise MessageError(
                f"{kind}: sequence {sequence} of boot {message.boot!r} was already used for another message"
            )
        row["duplicates"] += 1
        changes.change(row, received)
        return False
    if is_new:
        _advance(database, row, boot, sequence, received)
    row["received"] += 1
    changes.change(row, received)
    changes.insert(row["id"], boot["id"], sequence, kind, message.time, received, body)
    return True


def _advance(database: Database, row: Record, boot: Record, sequence: int, received: float) -> None:
    first, boot["highest"] = boot["highest"] + 1, sequence
    if sequence == first:
        return
    (counted,) = database.run("SELECT count(*) AS boots FROM boot WHERE device_id = ?", row["id"])
    is_watched = first > 1 or counted["boots"] > 1  # a device may have run for long before this store first heard of it
    missing = sequence - first
    database.run(
        "INSERT INTO gap (device_id, boot_id, first, last, missing, watched, opened) VALUES (?, ?, ?, ?, ?, ?, ?)",
        *(row["id"], boot["id"], first, sequence - 1, missing, int(is_watched), received),
    )
    database.run(ABSENT_INSERT, boot["id"], first, sequence - 1)
    row["missing" if is_watched else "unwatched"] += missing


def _arrive_late(database: Database, row: Record, boot_id: int, sequence: int, received: float) -> bool:
    """Strike a number off the absent ones and off its gap; False where it was there."""
    ranges = database.run(
        "SELECT first, last FROM absent WHERE boot_id = ? AND first <= ? ORDER BY first DESC LIMIT 1", boot_id, sequence
    )
    if not ranges or ranges[0]["last"] < sequence:
        return False
    first, last = ranges[0]["first"], ranges[0]["last"]
    database.run("DELETE FROM absent WHERE boot_id = ? AND first = ?", boot_id, first)
    left = [(boot_id, *part) for part in ((first, sequence - 1), (sequence + 1, last)) if part[0] <= part[1]]
    database.run_many(ABSENT_INSERT, left)
    (gap,) = database.run(
        "UPDATE gap SET missing = missing - 1, closed = CASE WHEN missing = 1 THEN ? END"
        " WHERE boot_id = ? AND first <= ? AND last >= ? RETURNING watched",
        *(received, boot_id, sequence, sequence),
    )
    row["missing" if gap["watched"] else "unwatched"] -= 1
    return True


def _dump(value: Any) -> str:
    # ASCII: a lone surrogate must not stop a commit; no infinity, which browsers cannot parse (ValueError)
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _printable(text: str, limit: int) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")[:limit]
