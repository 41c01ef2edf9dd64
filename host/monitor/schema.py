"""The tables of a store, the same in SQLite and PostgreSQL but for what `Dialect` names.

Each number of a boot up to its `highest` has arrived, unless it lies in one of the boot's ranges of `absent`. So a copy of
a message is known after its row is forgotten, and a gap never opens again.
"""

from dataclasses import dataclass

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a database says what the tables need."""

    counter: str  # an integer key that the database counts up
    blob: str
    clustered: str  # ends a table that is kept in the order of its key
    unique: str  # of an index on `message`, which may be divided by time


_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE device (
    id {counter} PRIMARY KEY,
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    boot_id BIGINT,                          -- the newest boot, known by its birth
    status TEXT NOT NULL DEFAULT 'unknown',
    state TEXT,                              -- JSON of the last birth of that boot
    first_seen DOUBLE PRECISION NOT NULL,
    last_seen DOUBLE PRECISION NOT NULL,
    latest TEXT NOT NULL DEFAULT '{{}}',     -- values of the newest telemetry, so that the fleet page reads one table
    latest_time DOUBLE PRECISION,
    recent TEXT NOT NULL DEFAULT '[]',
    received BIGINT NOT NULL DEFAULT 0,
    duplicates BIGINT NOT NULL DEFAULT 0,
    missing DOUBLE PRECISION NOT NULL DEFAULT 0,    -- of watched gaps; doubles, for no sum of gaps may overflow
    unwatched DOUBLE PRECISION NOT NULL DEFAULT 0,
    telemetry_since DOUBLE PRECISION NOT NULL DEFAULT -1e300,  -- by the device's clock: all since then is still there
    minutes_since DOUBLE PRECISION NOT NULL DEFAULT -1e300,
    UNIQUE (site, device)
);
CREATE TABLE boot (
    id {counter} PRIMARY KEY,
    device_id BIGINT NOT NULL,
    boot TEXT NOT NULL,
    highest BIGINT NOT NULL DEFAULT 0,       -- the highest sequence number seen
    superseded INTEGER NOT NULL DEFAULT 0,   -- a newer boot was born
    UNIQUE (device_id, boot)
);
CREATE TABLE absent (
    boot_id BIGINT NOT NULL,
    first BIGINT NOT NULL,
    last BIGINT NOT NULL,
    PRIMARY KEY (boot_id, first)
);
CREATE TABLE message (
    device_id BIGINT NOT NULL,
    boot_id BIGINT NOT NULL,
    sequence BIGINT NOT NULL,
    kind TEXT NOT NULL,                      -- telemetry, or the kind of event
    time DOUBLE PRECISION NOT NULL,          -- the device's clock
    received DOUBLE PRECISION NOT NULL,
    body TEXT NOT NULL
);
CREATE {unique} INDEX message_by_number ON message (boot_id, sequence);
CREATE INDEX telemetry_by_arrival ON message (received) WHERE kind = 'telemetry';
CREATE INDEX event_by_arrival ON message (received) WHERE kind != 'telemetry';
CREATE INDEX telemetry_by_time ON message (device_id, time) WHERE kind = 'telemetry';
CREATE INDEX event_by_time ON message (device_id, time) WHERE kind != 'telemetry';
CREATE TABLE rollup (
    device_id BIGINT NOT NULL,
    width_s INTEGER NOT NULL,                -- 60 or 3600
    start BIGINT NOT NULL,                   -- the device's clock
    received DOUBLE PRECISION NOT NULL,      -- when the first message of it arrived
    names TEXT NOT NULL,                     -- of the values, in the order of `numbers`
    numbers {blob} NOT NULL,                 -- doubles, as `aggregates.py` lays them out
    PRIMARY KEY (device_id, width_s, start)
){clustered};
CREATE INDEX rollup_by_arrival ON rollup (width_s, received);
CREATE TABLE gap (
    id {counter} PRIMARY KEY,
    device_id BIGINT NOT NULL,
    boot_id BIGINT NOT NULL,
    first BIGINT NOT NULL,
    last BIGINT NOT NULL,
    missing BIGINT NOT NULL,
    watched INTEGER NOT NULL,
    opened DOUBLE PRECISION NOT NULL,
    closed DOUBLE PRECISION
);
CREATE INDEX gap_by_boot ON gap (boot_id, first);
CREATE INDEX gap_by_device ON gap (device_id, id);
CREATE TABLE reply (
    id {counter} PRIMARY KEY,
    device_id BIGINT NOT NULL,
    command TEXT NOT NULL,
    received DOUBLE PRECISION NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (device_id, command)
);
CREATE TABLE result (
    id {counter} PRIMARY KEY,
    device_id BIGINT NOT NULL,
    received DOUBLE PRECISION NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX result_by_device ON result (device_id, id);
CREATE TABLE quarantine (
    id {counter} PRIMARY KEY,
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    topic TEXT NOT NULL,
    digest TEXT NOT NULL,
    reason TEXT NOT NULL,
    payload {blob} NOT NULL,                 -- its beginning
    payload_bytes BIGINT NOT NULL,
    seen BIGINT NOT NULL,
    first_seen DOUBLE PRECISION NOT NULL,
    last_seen DOUBLE PRECISION NOT NULL,
    UNIQUE (topic, digest)
);
CREATE INDEX quarantine_by_device ON quarantine (site, device, id);
CREATE TABLE quarantine_count (
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    count BIGINT NOT NULL,
    PRIMARY KEY (site, device)
)
"""


def statements(dialect: Dialect) -> list[str]:
    """What makes the tables of an empty store, in order."""
    text = _TABLES.format(
        counter=dialect.counter, blob=dialect.blob, clustered=dialect.clustered, unique=dialect.unique
    )
    return [statement.strip() for statement in text.split(";\n")]
