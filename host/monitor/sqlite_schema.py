"""The SQLite file: its tables, its version, and how it is opened.

WAL lets the page read while ingest writes. `synchronous=FULL`, because a message is acknowledged to the broker once it
is committed: a power cut must not take back what was acknowledged.
"""

import sqlite3
import uuid
from pathlib import Path

from host.errors import MonitorError

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE device (
    id INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    boot_id INTEGER,                        -- the newest boot, known by its birth
    status TEXT NOT NULL DEFAULT 'unknown',
    state TEXT,                             -- JSON of the last birth of that boot
    first_seen REAL NOT NULL,
    last_seen REAL NOT NULL,
    latest TEXT NOT NULL DEFAULT '{}',      -- values of the newest telemetry, so that the fleet page reads one table
    latest_time REAL,
    recent TEXT NOT NULL DEFAULT '[]',
    received INTEGER NOT NULL DEFAULT 0,
    duplicates INTEGER NOT NULL DEFAULT 0,
    UNIQUE (site, device)
);
CREATE TABLE boot (
    id INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    boot TEXT NOT NULL,
    highest INTEGER NOT NULL DEFAULT 0,     -- the highest sequence number seen
    superseded INTEGER NOT NULL DEFAULT 0,  -- a newer boot was born
    UNIQUE (device_id, boot)
);
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    boot_id INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    kind TEXT NOT NULL,                     -- telemetry, or the kind of event
    time REAL NOT NULL,                     -- the device's clock
    received REAL NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (boot_id, sequence)
);
CREATE INDEX telemetry_by_time ON message (device_id, time) WHERE kind = 'telemetry';
CREATE INDEX event_by_time ON message (device_id, time) WHERE kind != 'telemetry';
CREATE TABLE gap (
    id INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    boot_id INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    missing INTEGER NOT NULL,
    watched INTEGER NOT NULL,
    opened REAL NOT NULL,
    closed REAL
);
CREATE INDEX gap_by_boot ON gap (boot_id, first);
CREATE INDEX gap_by_device ON gap (device_id, id);
CREATE TABLE reply (device_id INTEGER NOT NULL, command TEXT NOT NULL, received REAL NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (device_id, command));
CREATE TABLE result (id INTEGER PRIMARY KEY, device_id INTEGER NOT NULL, received REAL NOT NULL, body TEXT NOT NULL);
CREATE INDEX result_by_device ON result (device_id, id);
CREATE TABLE quarantine (
    id INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    topic TEXT NOT NULL,
    digest TEXT NOT NULL,
    reason TEXT NOT NULL,
    payload BLOB NOT NULL,                  -- its beginning
    payload_bytes INTEGER NOT NULL,
    seen INTEGER NOT NULL,
    first_seen REAL NOT NULL,
    last_seen REAL NOT NULL,
    UNIQUE (topic, digest)
);
CREATE TABLE quarantine_count (site TEXT NOT NULL, device TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (site, device));
"""


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection that any thread may use in turn, in autocommit mode."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    connection.row_factory = sqlite3.Row
    return connection


def prepare(connection: sqlite3.Connection, path: Path) -> str:
    """Create the tables of a new file, refuse a foreign or newer one, and return the store's identity."""
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            _create_or_check(connection, path)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        row = connection.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
    except sqlite3.DatabaseError as error:
        raise MonitorError(f"{path}: cannot be used as a store ({error}); choose another file") from error
    return str(row["value"])


def _create_or_check(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise MonitorError(
            f"{path}: store schema {version} is newer than {SCHEMA_VERSION}, the one this version reads; "
            "upgrade fieldvit or choose another file"
        )
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise MonitorError(f"{path}: is a database of something else; choose another file")
    for statement in _SCHEMA.split(";\n"):
        if statement.strip():
            connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('identity', ?)", (uuid.uuid4().hex,))
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
