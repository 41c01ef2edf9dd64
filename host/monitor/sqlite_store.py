"""The store in one SQLite file; the rules it keeps are in `store.py`, its tables in `sqlite_schema.py`."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from device.contract.errors import MessageError
from device.contract.messages import Event, Reply, Result, State, Telemetry
from device.contract.records import to_table
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.sqlite_queries import SqliteQueries
from host.monitor.sqlite_schema import connect, prepare

RECENT_WINDOWS = 32  # points of the fleet page's latency sparkline
KEPT_PER_DEVICE = 200  # results and replies
KEPT_QUARANTINED = 100  # per device; unreadable topics share one such allowance
KEPT_PAYLOAD_BYTES = 4096
_OUTERMOST = ("BEGIN IMMEDIATE", "COMMIT", ("ROLLBACK",))
_NESTED = ("SAVEPOINT record", "RELEASE record", ("ROLLBACK TO record", "RELEASE record"))


class SqliteStore(SqliteQueries):
    """One connection writes and one reads, each behind its lock, so the page never waits for a commit."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = connect(path)
        except (OSError, sqlite3.Error) as error:
            raise MonitorError(f"{path}: cannot be opened ({error}); choose a folder you may write") from error
        try:
            self.identity = prepare(self._writer, path)
        except MonitorError:
            self._writer.close()
            raise
        self._path = path
        self._write_lock = threading.RLock()
        super().__init__(connect(path))

    def close(self) -> None:
        with self._write_lock:
            self._writer.close()
        super().close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._write_lock:
            nested = self._writer.in_transaction  # a record inside a batch: it may fail alone, the batch commits
            begin, commit, undo = _NESTED if nested else _OUTERMOST
            try:
                self._writer.execute(begin)
                yield
                self._writer.execute(commit)
            except BaseException as error:
                for statement in undo if self._writer.in_transaction else ():
                    self._writer.execute(statement)
                if isinstance(error, sqlite3.Error):
                    raise MonitorError(f"{self._path}: cannot be written ({error}); free disk space there") from error
                raise

    def record_state(self, device: DeviceId, state: State, *, received: float, retained: bool = False) -> None:
        alive = received
        if state.status == "offline" or retained:
            alive = min(received, state.time) if state.time is not None else 0.0
        with self.transaction():
            row = self._device(device, received, alive=alive)
            boot = self._boot(row["id"], state.boot)
            if boot["superseded"]:
                return
            if state.status == "online":
                self._be_born(row, boot["id"], state)
            elif row["boot_id"] in (None, boot["id"]):
                kept = row["state"] or _dump(to_table(state))  # the birth says more than the will
                self._set_state(row["id"], "offline", boot["id"], kept)

    def record_telemetry(self, device: DeviceId, telemetry: Telemetry, *, received: float) -> bool:
        with self.transaction():
            row = self._device(device, received, alive=received)
            body = _dump(telemetry.values)
            if not self._record_message(row, "telemetry", telemetry, body, received):
                return False
            if row["latest_time"] is None or telemetry.time >= row["latest_time"]:
                recent = json.loads(row["recent"])
                if "latency/p50" in telemetry.values:
                    recent = [*recent, telemetry.values["latency/p50"]][-RECENT_WINDOWS:]
                self._run(
                    "UPDATE device SET latest = ?, latest_time = ?, recent = ? WHERE id = ?",
                    *(body, telemetry.time, json.dumps(recent), row["id"]),
                )
            return True

    def record_event(self, device: DeviceId, event: Event, *, received: float) -> bool:
        with self.transaction():
            row = self._device(device, received, alive=received)
            return self._record_message(row, event.kind, event, _dump(event.data), received)

    def record_reply(self, device: DeviceId, reply: Reply, *, received: float) -> None:
        with self.transaction():
            row = self._device(device, received, alive=received)
            body = _dump(to_table(reply))
            self._run("INSERT OR IGNORE INTO reply VALUES (?, ?, ?, ?)", row["id"], reply.id, received, body)
            self._keep_newest("reply", "rowid", "device_id = ?", (row["id"],), KEPT_PER_DEVICE)

    def record_result(self, device: DeviceId, result: Result, *, received: float) -> None:
        with self.transaction():
            row = self._device(device, received, alive=received)
            body = _dump(to_table(result))
            self._run("INSERT INTO result (device_id, received, body) VALUES (?, ?, ?)", row["id"], received, body)
            self._keep_newest("result", "id", "device_id = ?", (row["id"],), KEPT_PER_DEVICE)

    def quarantine(
        self, topic: str, payload: bytes, reason: str, *, received: float, device: DeviceId | None = None
    ) -> None:
        owner = (device.site, device.device) if device else ("", "")
        topic, reason = _printable(topic, 512), _printable(reason, 512)
        digest = hashlib.sha256(payload).hexdigest()
        with self.transaction():
            self._run(
                "INSERT INTO quarantine"
                " (site, device, topic, digest, reason, payload, payload_bytes, first_seen, last_seen, seen)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)"
                " ON CONFLICT (topic, digest) DO UPDATE SET seen = seen + 1, last_seen = excluded.last_seen",
                *(*owner, topic, digest, reason, payload[:KEPT_PAYLOAD_BYTES], len(payload), received, received),
            )
            self._run(
                "INSERT INTO quarantine_count VALUES (?, ?, 1)"
                " ON CONFLICT (site, device) DO UPDATE SET count = count + 1",
                *owner,
            )
            self._keep_newest("quarantine", "id", "site = ? AND device = ?", owner, KEPT_QUARANTINED)

    def _run(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self._writer.execute(sql, values)

    def _device(self, device: DeviceId, received: float, *, alive: float) -> sqlite3.Row:
        self._run(
            "INSERT INTO device (site, device, first_seen, last_seen) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (site, device) DO UPDATE SET last_seen = max(last_seen, excluded.last_seen)",
            *(device.site, device.device, received, alive),
        )
        row: sqlite3.Row = self._run(
            "SELECT * FROM device WHERE site = ? AND device = ?", device.site, device.device
        ).fetchone()
        return row

    def _boot(self, device_id: int, boot: str) -> sqlite3.Row:
        self._run("INSERT OR IGNORE INTO boot (device_id, boot) VALUES (?, ?)", device_id, boot)
        row: sqlite3.Row = self._run("SELECT * FROM boot WHERE device_id = ? AND boot = ?", device_id, boot).fetchone()
        return row

    def _be_born(self, row: sqlite3.Row, boot_id: int, state: State) -> None:
        if row["boot_id"] not in (None, boot_id):
            self._run("UPDATE boot SET superseded = 1 WHERE id = ?", row["boot_id"])
        self._set_state(row["id"], "online", boot_id, _dump(to_table(state)))

    def _set_state(self, device_id: int, status: str, boot_id: int, state: str) -> None:
        self._run(
            "UPDATE device SET status = ?, boot_id = ?, state = ? WHERE id = ?", status, boot_id, state, device_id
        )

    def _record_message(
        self, row: sqlite3.Row, kind: str, message: Telemetry | Event, body: str, received: float
    ) -> bool:
        boot = self._boot(row["id"], message.boot)
        inserted = self._run(
            "INSERT OR IGNORE INTO message (device_id, boot_id, sequence, kind, time, received, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(row["id"], boot["id"], message.sequence, kind, message.time, received, body),
        ).rowcount
        if not inserted:
            self._count_duplicate(row["id"], boot["id"], kind, message, body)
            return False
        self._run("UPDATE device SET received = received + 1 WHERE id = ?", row["id"])
        if message.sequence > boot["highest"]:
            self._advance(row["id"], boot, message.sequence, received)
        else:
            self._run(
                "UPDATE gap SET missing = missing - 1, closed = CASE WHEN missing = 1 THEN ? END"
                " WHERE boot_id = ? AND first <= ? AND last >= ?",
                *(received, boot["id"], message.sequence, message.sequence),
            )
        return True

    def _count_duplicate(self, device_id: int, boot_id: int, kind: str, message: Telemetry | Event, body: str) -> None:
        kept = self._run(
            "SELECT kind, time, body FROM message WHERE boot_id = ? AND sequence = ?", boot_id, message.sequence
        ).fetchone()
        if tuple(kept) != (kind, message.time, body):
            raise MessageError(
                f"{kind}: sequence {message.sequence} of boot {message.boot!r} was already used for another message"
            )
        self._run("UPDATE device SET duplicates = duplicates + 1 WHERE id = ?", device_id)

    def _advance(self, device_id: int, boot: sqlite3.Row, sequence: int, received: float) -> None:
        self._run("UPDATE boot SET highest = ? WHERE id = ?", sequence, boot["id"])
        first = boot["highest"] + 1
        if sequence == first:
            return
        (boots,) = self._run("SELECT count(*) FROM boot WHERE device_id = ?", device_id).fetchone()
        is_watched = first > 1 or boots > 1  # a device may have run for long before this store first heard of it
        self._run(
            "INSERT INTO gap (device_id, boot_id, first, last, missing, watched, opened) VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(device_id, boot["id"], first, sequence - 1, sequence - first, is_watched, received),
        )

    def _keep_newest(self, table: str, key: str, where: str, values: tuple[Any, ...], limit: int) -> None:
        self._run(
            f"DELETE FROM {table} WHERE {key} IN"
            f" (SELECT {key} FROM {table} WHERE {where} ORDER BY {key} DESC LIMIT -1 OFFSET ?)",
            *(*values, limit),
        )


def _dump(value: Any) -> str:
    # ASCII: a lone surrogate must not stop a commit; no infinity, which browsers cannot parse (ValueError)
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _printable(text: str, limit: int) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:limit]
