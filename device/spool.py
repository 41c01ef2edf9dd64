"""Messages that wait for the broker, in SQLite: written before they are sent, kept until some time after the acknowledgement.

A broker that is killed may lose what it has acknowledged and not delivered: what it keeps on disk is written at intervals.
So telemetry and events stay here for `KEEP_S` after their acknowledgement, and are sent again after each reconnect; the
receiver drops what it has. Replies are not: whoever asked would get two.

Bounded by bytes and by age; telemetry is dropped before events, these before replies, the oldest first, and every drop is
counted for good. Commands are remembered here too, so that each gets exactly one reply: a command counts as received once it is
committed, and its reply is stored in the transaction that marks it done. `synchronous=FULL` with WAL: one fsync for each
message, a few a minute.

Disk trouble must not stop inference. A damaged file is set aside as `NAME.damaged` (the last one is kept) and what it held
is counted as dropped. While the disk is full or fails, a small database in memory takes over, with the same bounds and
drops; it is moved to the file as soon as that can be written again. Only the figures of the last good moment are needed
for that, and they are kept in memory: `depth`, `dropped` and the others never touch the disk.

Age is counted in seconds that the agent ran, not by the wall clock: a board without a clock of its own jumps by years when
it first hears the time, and would throw away all that waits.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

T = TypeVar("T")

LOW, HIGH, URGENT = 0, 1, 2
SYNCHRONOUS = "FULL"
COMMANDS_KEPT = 1000
MAX_COMMANDS = 10_000
"""Commands remembered at most, however late they expire; the oldest are forgotten first."""
MAX_MESSAGE_BYTES = 1 << 20
MEMORY_BYTES = 2 << 20
RETRY_S = 10.0
KEEP_S = 30.0
"""Longer than the `autosave_interval` of the brokers that we configure."""
KEPT_BYTES = 1 << 20
KEPT_SHARE = 8
"""At most this part of the spool's bytes, too: 1 / KEPT_SHARE."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, payload BLOB NOT NULL,
    priority INTEGER NOT NULL, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS message_priority ON message (priority, id);
CREATE INDEX IF NOT EXISTS message_created ON message (created);
CREATE TABLE IF NOT EXISTS sent (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, payload BLOB NOT NULL,
    priority INTEGER NOT NULL, created REAL NOT NULL, acknowledged REAL NOT NULL);
CREATE TABLE IF NOT EXISTS command (id TEXT PRIMARY KEY, received REAL NOT NULL, expires REAL NOT NULL, reply BLOB);
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value NUMERIC NOT NULL);
INSERT OR IGNORE INTO counter VALUES ('bytes', 0), ('kept', 0), ('dropped', 0), ('journal', 0), ('uptime', 0),
    ('depth', (SELECT count(*) FROM message));
CREATE TRIGGER IF NOT EXISTS message_added AFTER INSERT ON message BEGIN
    UPDATE counter SET value = value + length(new.payload) WHERE name = 'bytes'; END;
CREATE TRIGGER IF NOT EXISTS message_removed AFTER DELETE ON message BEGIN
    UPDATE counter SET value = value - length(old.payload) WHERE name = 'bytes'; END;
CREATE TRIGGER IF NOT EXISTS sent_added AFTER INSERT ON sent BEGIN
    UPDATE counter SET value = value + length(new.payload) WHERE name = 'kept'; END;
CREATE TRIGGER IF NOT EXISTS sent_removed AFTER DELETE ON sent BEGIN
    UPDATE counter SET value = value - length(old.payload) WHERE name = 'kept'; END;
CREATE TRIGGER IF NOT EXISTS message_in AFTER INSERT ON message BEGIN
    UPDATE counter SET value = value + 1 WHERE name = 'depth'; END;
CREATE TRIGGER IF NOT EXISTS message_out AFTER DELETE ON message BEGIN
    UPDATE counter SET value = value - 1 WHERE name = 'depth'; END;
"""
_COUNTERS = "SELECT name, value FROM counter UNION ALL SELECT 'last_id', seq FROM sqlite_sequence"
_ANSWER = """INSERT INTO command (id, received, expires, reply) VALUES (?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET reply = excluded.reply WHERE reply IS NULL"""
_NOTHING = {"bytes": 0.0, "dropped": 0.0, "journal": 0.0, "uptime": 0.0, "depth": 0.0, "last_id": 0.0}
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

SpoolError = sqlite3.Error

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """One stored message: `kind` is its topic's last level."""

    id: int
    kind: str
    payload: bytes


class Spool:
    """One database file, usable from any thread."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        max_age_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create.

        Args:
            path: the file.
            max_bytes: of payloads.
            max_age_s: of a message, in seconds that the agent ran.
            clock: seconds that never jump.
            wall_clock: what a command's expiry is compared with.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock, self._wall_clock = clock, wall_clock
        self._lock = threading.Lock()
        self._numbering = threading.Lock()  # held while a number is given and its message stored
        self._sequence = 0
        self._started = clock()
        self._on_disk = _peek(path)  # figures of the file while memory stands in for it
        self._figures = dict(_NOTHING)  # figures of the open database
        self._is_in_memory = True
        self._retry_at = self._started
        self._trouble = ""
        self._db = _open(None)
        if not self._move_to_disk():
            self._begin_memory()
        self._uptime_before = self._figures["uptime"] if not self._is_in_memory else self._on_disk["uptime"]

    def close(self) -> None:
        """Write what memory still holds, if the disk takes it by now, and close."""
        with self._lock:
            if self._is_in_memory and not self._move_to_disk():
                log.error("%s: %d messages are lost", self._path, int(self._figures["depth"]))
            self._db.close()

    def put(self, kind: str, payload: bytes, *, priority: int = HIGH) -> None:
        """Store a message."""
        self._change(lambda db: self._insert(db, kind, payload, priority))

    def put_numbered(self, kind: str, build: Callable[[int], bytes], *, priority: int = HIGH) -> None:
        """Store a message that carries the boot's next sequence number."""
        with self._numbering:
            payload = build(self._sequence + 1)
            self._sequence += 1
            self._change(lambda db: self._insert(db, kind, payload, priority))

    def put_journaled(self, number: int, build: Callable[[int], bytes] | None) -> None:
        """Store the event of journal entry `number`, if it has one, and move the mark past it: both or neither."""

        def store(db: sqlite3.Connection) -> None:
            if payload is not None:
                self._insert(db, "event", payload, HIGH)
            db.execute("UPDATE counter SET value = ? WHERE name = 'journal'", (number,))

        with self._numbering:
            payload = build(self._sequence + 1) if build else None
            self._change(store)
            self._sequence += payload is not None

    def pending(self, after: int, limit: int, *, are_replies: bool | None = None) -> list[Message]:
        """The oldest messages with a higher id: replies, all others, or (None) both."""
        lane = {None: "", True: f"AND priority = {URGENT}", False: f"AND priority < {URGENT}"}[are_replies]
        query = f"SELECT id, kind, payload FROM message WHERE id > ? {lane} ORDER BY id LIMIT ?"
        return self._do(lambda db: [Message(*row) for row in db.execute(query, (after, limit))])

    def acknowledge(self, message_id: int) -> None:
        """The broker has taken a message: it waits no more, and is kept for `resend`."""

        def acknowledge(db: sqlite3.Connection) -> None:
            now = self._uptime()
            row = f"SELECT id, kind, payload, priority, created, ? FROM message WHERE id = ? AND priority < {URGENT}"
            db.execute(f"INSERT OR REPLACE INTO sent {row}", (now, message_id))
            db.execute("DELETE FROM message WHERE id = ?", (message_id,))
            self._forget_sent(db, now)

        self._change(acknowledge)

    def resend(self) -> int:
        """Have what was acknowledged lately sent again, before all else; returns how many messages."""

        def resend(db: sqlite3.Connection) -> int:
            self._forget_sent(db, self._uptime())
            columns = "id, kind, payload, priority, created"
            count = db.execute(f"INSERT INTO message ({columns}) SELECT {columns} FROM sent").rowcount
            db.execute("DELETE FROM sent")
            return count

        return self._change(resend)

    def _forget_sent(self, db: sqlite3.Connection, now: float) -> None:
        db.execute("DELETE FROM sent WHERE acknowledged < ?", (now - KEEP_S,))
        while _value(db, "kept") > min(KEPT_BYTES, self._max_bytes / KEPT_SHARE):
            db.execute("DELETE FROM sent WHERE id = (SELECT min(id) FROM sent)")

    def _uptime(self) -> float:
        """Seconds that the agent has run, over all its starts."""
        return self._uptime_before + self._clock() - self._started

    def drop(self, message_id: int) -> None:
        """Delete a message that no broker will take, and count it."""

        def drop(db: sqlite3.Connection) -> None:
            _count(db, "dropped", db.execute("DELETE FROM message WHERE id = ?", (message_id,)).rowcount)

        self._change(drop)

    def receive_command(self, command_id: str, expires: float) -> bool:
        """Remember a command; False when it is known already, answered or not."""

        def receive(db: sqlite3.Connection) -> bool:
            query = "INSERT OR IGNORE INTO command (id, received, expires) VALUES (?, ?, ?)"
            is_new = db.execute(query, (command_id, self._wall_clock(), expires)).rowcount == 1
            self._forget_old_commands(db)
            return is_new

        return self._change(receive)

    def answer_command(self, command_id: str, reply: bytes) -> bool:
        """Store the one reply of a command; False when it has one already."""

        def answer(db: sqlite3.Connection) -> bool:
            # the mark alone is kept with the command: the reply itself is a message
            if db.execute(_ANSWER, (command_id, self._wall_clock(), 0.0, b"")).rowcount == 0:
                return False
            self._insert(db, "reply", reply, URGENT)
            return True

        return self._change(answer)

    def unanswered_commands(self) -> list[str]:
        """Commands that were received and have no reply: after a start, those that a crash interrupted."""
        query = "SELECT id FROM command WHERE reply IS NULL ORDER BY rowid"
        return self._do(lambda db: [row[0] for row in db.execute(query)])

    @property
    def depth(self) -> int:
        return int(self._figure("depth"))

    @property
    def payload_bytes(self) -> int:
        return int(self._figure("bytes"))

    @property
    def dropped(self) -> int:
        return int(self._figure("dropped"))

    @property
    def journal_mark(self) -> int:
        """The last journal entry whose event is stored."""
        return int(self._figures["journal"])

    def _figure(self, name: str) -> float:
        with self._lock:
            return self._figures[name] + (self._on_disk[name] if self._is_in_memory else 0)

    def _change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def transaction(db: sqlite3.Connection) -> T:
            with _transaction(db):
                result = work(db)
            self._figures = _read_figures(db)
            return result

        return self._do(transaction)

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a piece of work on the file, or on the memory that stands in for it; it must bear to run twice."""
        with self._lock:
            if self._is_in_memory and self._clock() >= self._retry_at and not self._move_to_disk():
                self._retry_at = self._clock() + RETRY_S
            try:
                return work(self._db)
            except sqlite3.ProgrammingError:  # closed: not the disk's fault
                raise
            except sqlite3.Error as error:
                if self._is_in_memory:
                    raise
                self._leave_disk(error)
                return work(self._db)

    def _leave_disk(self, error: sqlite3.Error) -> None:
        self._report(error)
        file, self._db, self._on_disk = self._db, _open(None), self._figures
        with contextlib.suppress(sqlite3.Error):  # what was obeyed once is not obeyed again
            rows = file.execute("SELECT id, received, expires, reply FROM command ORDER BY rowid").fetchall()
            self._db.executemany("INSERT INTO command (id, received, expires, reply) VALUES (?, ?, ?, ?)", rows)
        with contextlib.suppress(sqlite3.Error):
            file.close()
        self._begin_memory()
        if _is_damage(error):
            self._move_to_disk()

    def _begin_memory(self) -> None:
        """Go on with the file's numbers: a message's id is never given twice."""
        self._is_in_memory = True
        self._retry_at = self._clock() + RETRY_S
        self._db.execute("INSERT INTO sqlite_sequence VALUES ('message', ?)", (int(self._on_disk["last_id"]),))
        self._db.execute("UPDATE counter SET value = ? WHERE name = 'journal'", (self._on_disk["journal"],))
        self._figures = _read_figures(self._db)

    def _move_to_disk(self) -> bool:
        """Open the file, or a fresh one in place of a damaged one, and move there what memory holds."""
        try:
            file = self._open_file()
        except (sqlite3.Error, OSError) as error:
            self._report(error)
            return False
        try:
            with _transaction(file):
                self._copy_to(file)
            figures = _read_figures(file)
        except sqlite3.Error as error:
            self._report(error)
            with contextlib.suppress(sqlite3.Error):
                file.close()
            return False
        self._db.close()
        self._db, self._figures, self._is_in_memory, self._trouble = file, figures, False, ""
        return True

    def _report(self, error: Exception) -> None:
        if str(error) != self._trouble:
            log.error("%s: %s; messages are kept in memory until the disk works again", self._path, error)
        self._trouble = str(error)

    def _open_file(self) -> sqlite3.Connection:
        try:
            return _open(self._path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            lost = max(int(self._on_disk["depth"]), 1)
            log.error(
                "%s: damaged (%s); set aside as %s.damaged, %d messages are lost",
                self._path,
                error,
                self._path.name,
                lost,
            )
            _set_aside(self._path)
            file = _open(self._path)
            with _transaction(file):
                _count(file, "dropped", int(self._on_disk["dropped"]) + lost)
                file.execute("UPDATE counter SET value = ? WHERE name = 'journal'", (self._on_disk["journal"],))
                file.execute("UPDATE counter SET value = ? WHERE name = 'uptime'", (self._on_disk["uptime"],))
            return file

    def _copy_to(self, file: sqlite3.Connection) -> None:
        """Append what memory holds. The file's messages get new ids too, so that the connection looks at them again."""
        if self._figures["last_id"]:
            given = int(max(self._figures["last_id"], _read_figures(file)["last_id"]))
            oldest, newest = file.execute("SELECT min(id), max(id) FROM message").fetchone()
            if oldest is not None:
                file.execute("UPDATE message SET id = id + ?", (given + 1 - oldest,))
                given += newest + 1 - oldest
            file.execute("DELETE FROM sqlite_sequence")
            file.execute("INSERT INTO sqlite_sequence VALUES ('message', ?)", (given,))
        for kind, payload, priority, created in self._db.execute(
            "SELECT kind, payload, priority, created FROM message ORDER BY id"
        ):
            self._insert(file, kind, payload, priority, created)
        commands = self._db.execute("SELECT id, received, expires, reply FROM command ORDER BY rowid").fetchall()
        file.executemany(_ANSWER, commands)
        self._forget_old_commands(file)
        _count(file, "dropped", int(self._figures["dropped"]))
        journal = "UPDATE counter SET value = max(value, ?) WHERE name = 'journal'"
        file.execute(journal, (self._figures["journal"],))

    def _insert(
        self, db: sqlite3.Connection, kind: str, payload: bytes, priority: int, created: float | None = None
    ) -> None:
        max_bytes = min(self._max_bytes, MEMORY_BYTES) if db is self._db and self._is_in_memory else self._max_bytes
        if len(payload) > min(max_bytes, MAX_MESSAGE_BYTES):
            _count(db, "dropped", 1)
            return
        now = self._uptime()
        query = "INSERT INTO message (kind, payload, priority, created) VALUES (?, ?, ?, ?)"
        db.execute(query, (kind, payload, priority, now if created is None else created))
        dropped = db.execute("DELETE FROM message WHERE created < ?", (now - self._max_age_s,)).rowcount
        while _value(db, "bytes") > max_bytes:
            query = "DELETE FROM message WHERE id = (SELECT id FROM message ORDER BY priority, id LIMIT 1)"
            dropped += db.execute(query).rowcount
        _count(db, "dropped", dropped)
        db.execute("UPDATE counter SET value = max(value, ?) WHERE name = 'uptime'", (now,))

    def _forget_old_commands(self, db: sqlite3.Connection) -> None:
        """Forget answered commands that could not be obeyed again anyway, once there are many, and any beyond the bound."""
        newest = "SELECT rowid FROM command ORDER BY rowid DESC LIMIT ?"
        expired = f"DELETE FROM command WHERE reply IS NOT NULL AND expires < ? AND rowid NOT IN ({newest})"
        db.execute(expired, (self._wall_clock(), COMMANDS_KEPT))
        db.execute(f"DELETE FROM command WHERE rowid NOT IN ({newest})", (MAX_COMMANDS,))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    with db:  # commits, or rolls back when the block raises
        db.execute("BEGIN IMMEDIATE")
        yield


def _value(db: sqlite3.Connection, name: str) -> float:
    return float(db.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()[0])


def _count(db: sqlite3.Connection, name: str, amount: int) -> None:
    db.execute("UPDATE counter SET value = value + ? WHERE name = ?", (amount, name))


def _read_figures(db: sqlite3.Connection) -> dict[str, float]:
    return _NOTHING | {name: float(value) for name, value in db.execute(_COUNTERS)}


def _is_damage(error: sqlite3.Error) -> bool:
    return isinstance(error, _DamagedError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


class _DamagedError(sqlite3.DatabaseError):
    """SQLite's own check found damage."""


def _open(path: Path | None) -> sqlite3.Connection:
    """Open or create a file, or without a path a database in memory."""
    database = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=5)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
        database.execute("PRAGMA auto_vacuum=FULL")
        database.executescript(_SCHEMA)
        verdict = database.execute("PRAGMA quick_check").fetchone()[0]
        if verdict != "ok":
            raise _DamagedError(verdict)
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def _peek(path: Path) -> dict[str, float]:
    """The figures of a file that may be damaged or cannot be written, as far as they can be read."""
    with contextlib.suppress(sqlite3.Error):
        database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
        try:
            return _read_figures(database)
        finally:
            database.close()
    return dict(_NOTHING)


def _set_aside(path: Path) -> None:
    os.replace(path, path.with_name(path.name + ".damaged"))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
