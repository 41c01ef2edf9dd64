"""Messages that wait for the broker, in SQLite: written before they are sent, deleted after the acknowledgement.

Bounded by bytes and by age; telemetry is dropped before events and replies, the oldest first, and every drop is counted
for good. Commands are remembered here too, so that each gets exactly one reply: a command counts as received once it is
committed, and its reply is stored in the transaction that marks it done. `synchronous=FULL` with WAL: one fsync for each
message, a few a minute.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device.contract.errors import ConfigError

LOW, HIGH = 0, 1
SYNCHRONOUS = "FULL"
COMMANDS_KEPT = 1000
MAX_MESSAGE_BYTES = 1 << 20
_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, payload BLOB NOT NULL,
    priority INTEGER NOT NULL, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS message_priority ON message (priority, id);
CREATE INDEX IF NOT EXISTS message_created ON message (created);
CREATE TABLE IF NOT EXISTS command (id TEXT PRIMARY KEY, received REAL NOT NULL, expires REAL NOT NULL, reply BLOB);
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO counter VALUES ('bytes', 0), ('dropped', 0), ('journal', 0);
CREATE TRIGGER IF NOT EXISTS message_added AFTER INSERT ON message BEGIN
    UPDATE counter SET value = value + length(new.payload) WHERE name = 'bytes'; END;
CREATE TRIGGER IF NOT EXISTS message_removed AFTER DELETE ON message BEGIN
    UPDATE counter SET value = value - length(old.payload) WHERE name = 'bytes'; END;
"""

SpoolError = sqlite3.Error
"""What a full or failing disk raises where a message cannot simply be counted as lost."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """One stored message: `kind` is its topic's last level."""

    id: int
    kind: str
    payload: bytes


class Spool:
    """One database file, usable from any thread."""

    def __init__(self, path: Path, *, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.time) -> None:
        """Open or create; a file that is no database any more is set aside, and counted as one drop."""
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._lock = threading.Lock()
        self._numbering = threading.Lock()  # held while a number is given and its message stored
        self._sequence = 0
        self._lost = 0
        try:
            self._db = _open(path)
        except sqlite3.OperationalError as error:
            raise ConfigError(f"{path}: cannot be opened ({error}); check the directory and the disk") from error
        except sqlite3.DatabaseError as error:
            log.error("%s: damaged (%s); set aside as %s.damaged, its messages are lost", path, error, path.name)
            _set_aside(path)
            self._db = _open(path)
            with self._transaction():
                self._count("dropped", 1)

    def close(self) -> None:
        self._db.close()

    def put(self, kind: str, payload: bytes, *, priority: int = HIGH) -> None:
        """Store a message."""
        self._store(lambda: self._insert(kind, payload, priority))

    def put_numbered(self, kind: str, build: Callable[[int], bytes], *, priority: int = HIGH) -> None:
        """Store a message that carries the boot's next sequence number."""
        with self._numbering:
            payload = build(self._sequence + 1)
            self._sequence += 1
            self._store(lambda: self._insert(kind, payload, priority))

    def put_journaled(self, number: int, build: Callable[[int], bytes] | None) -> None:
        """Store the event of journal entry `number`, if it has one, and move the mark past it: both or neither."""
        with self._numbering:
            payload = build(self._sequence + 1) if build else None
            with self._transaction():
                if payload is not None:
                    self._insert("event", payload, HIGH)
                self._count("journal", number - self._value("journal"))
            self._sequence += payload is not None

    def pending(self, after: int, limit: int) -> list[Message]:
        """The oldest messages with a higher id."""
        query = "SELECT id, kind, payload FROM message WHERE id > ? ORDER BY id LIMIT ?"
        with self._lock:
            return [Message(*row) for row in self._db.execute(query, (after, limit))]

    def acknowledge(self, message_id: int) -> None:
        """Delete a message that the broker has taken."""
        with self._transaction():
            self._db.execute("DELETE FROM message WHERE id = ?", (message_id,))

    def receive_command(self, command_id: str, expires: float) -> bool:
        """Remember a command; False when it is known already, answered or not."""
        with self._transaction():
            query = "INSERT OR IGNORE INTO command (id, received, expires) VALUES (?, ?, ?)"
            is_new = self._db.execute(query, (command_id, self._clock(), expires)).rowcount == 1
            self._forget_old_commands()
            return is_new

    def answer_command(self, command_id: str, reply: bytes) -> bool:
        """Store the one reply of a command; False when it has one already."""
        with self._transaction():
            query = "UPDATE command SET reply = ? WHERE id = ? AND reply IS NULL"
            if self._db.execute(query, (reply, command_id)).rowcount == 0:
                return False
            self._insert("reply", reply, HIGH)
            return True

    def unanswered_commands(self) -> list[str]:
        """Commands that were received and have no reply: after a start, those that a crash interrupted."""
        with self._lock:
            return [row[0] for row in self._db.execute("SELECT id FROM command WHERE reply IS NULL ORDER BY received")]

    @property
    def depth(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM message").fetchone()[0])

    @property
    def payload_bytes(self) -> int:
        with self._lock:
            return self._value("bytes")

    @property
    def dropped(self) -> int:
        with self._lock:
            return self._value("dropped") + self._lost

    @property
    def journal_mark(self) -> int:
        """The last journal entry whose event is stored."""
        with self._lock:
            return self._value("journal")

    def _store(self, insert: Callable[[], None]) -> None:
        """A full disk must not stop inference: what cannot be stored is counted as dropped, while the agent lives."""
        try:
            with self._transaction():
                insert()
        except sqlite3.OperationalError as error:
            self._lost += 1
            log.error("message lost, the spool cannot be written: %s", error)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._db:  # commits, or rolls back when the block raises
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _insert(self, kind: str, payload: bytes, priority: int) -> None:
        if len(payload) > min(self._max_bytes, MAX_MESSAGE_BYTES):
            self._count("dropped", 1)
            return
        query = "INSERT INTO message (kind, payload, priority, created) VALUES (?, ?, ?, ?)"
        self._db.execute(query, (kind, payload, priority, self._clock()))
        dropped = self._db.execute("DELETE FROM message WHERE created < ?", (self._clock() - self._max_age_s,)).rowcount
        while self._value("bytes") > self._max_bytes:
            query = "DELETE FROM message WHERE id = (SELECT id FROM message ORDER BY priority, id LIMIT 1)"
            dropped += self._db.execute(query).rowcount
        self._count("dropped", dropped)

    def _value(self, name: str) -> int:
        return int(self._db.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()[0])

    def _count(self, name: str, amount: int) -> None:
        self._db.execute("UPDATE counter SET value = value + ? WHERE name = ?", (amount, name))

    def _forget_old_commands(self) -> None:
        """Forget answered commands that could not be obeyed again anyway, once there are many."""
        query = """DELETE FROM command WHERE reply IS NOT NULL AND expires < ? AND id NOT IN
            (SELECT id FROM command ORDER BY received DESC LIMIT ?)"""
        self._db.execute(query, (self._clock(), COMMANDS_KEPT))


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
        database.execute("PRAGMA auto_vacuum=FULL")
        database.executescript(_SCHEMA)
        verdict = database.execute("PRAGMA quick_check").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def _set_aside(path: Path) -> None:
    os.replace(path, path.with_name(path.name + ".damaged"))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
