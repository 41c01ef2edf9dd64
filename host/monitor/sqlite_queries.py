"""What the page asks of the SQLite store; reads only, on a connection of its own."""

import itertools
import json
import math
import sqlite3
import threading
from typing import Any

from device.contract.messages import Event, Reply, State
from device.contract.records import from_table
from device.contract.topics import DeviceId
from host.monitor.rows import DeviceRow, EventRow, Gap, Quarantined, Series

MAX_ROWS = 20_000  # telemetry messages read for one chart; beyond it every n-th sequence number is read
MEANS = frozenset({"latency/p50", "throughput", "confidence"})  # thinned by the mean; all others by the worst value
SILENCE_FACTOR = 4.0  # a pause this many times the usual interval interrupts the line

_DEVICES = """
SELECT device.*, boot.boot AS boot_name, coalesce(quarantine_count.count, 0) AS quarantined,
    (SELECT total(missing) FROM gap WHERE gap.device_id = device.id AND watched AND missing > 0) AS missing,
    (SELECT total(missing) FROM gap WHERE gap.device_id = device.id AND NOT watched AND missing > 0) AS unwatched
FROM device LEFT JOIN boot ON boot.id = device.boot_id LEFT JOIN quarantine_count USING (site, device)
"""
_PLAIN_COLUMNS = ("first_seen", "last_seen", "latest_time", "received", "duplicates", "quarantined")
_OF_DEVICE = "(SELECT id FROM device WHERE site = ? AND device = ?)"


class SqliteQueries:
    """The reading half of `Store`."""

    def __init__(self, reader: sqlite3.Connection) -> None:
        self._reader = reader
        self._reader.execute("PRAGMA query_only = 1")
        self._read_lock = threading.Lock()

    def close(self) -> None:
        with self._read_lock:
            self._reader.close()

    def _fetch(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._read_lock:
            return self._reader.execute(sql, values).fetchall()

    def devices(self) -> list[DeviceRow]:
        return [_device_row(row) for row in self._fetch(_DEVICES + "ORDER BY site, device")]

    def device(self, device: DeviceId) -> DeviceRow | None:
        rows = self._fetch(_DEVICES + "WHERE site = ? AND device = ?", device.site, device.device)
        return _device_row(rows[0]) if rows else None

    def telemetry(
        self, device: DeviceId, names: tuple[str, ...], *, since: float, until: float, points: int = 600
    ) -> Series:
        where = f"FROM message WHERE kind = 'telemetry' AND device_id = {_OF_DEVICE} AND time BETWEEN ? AND ?"
        values = (device.site, device.device, since, until)
        (count,) = self._fetch(f"SELECT count(*) {where}", *values)[0]
        stride = math.ceil(count / MAX_ROWS) or 1
        rows = self._fetch(f"SELECT time, body {where} AND sequence % ? = 0 ORDER BY time", *values, stride)
        samples = [(row["time"], json.loads(row["body"])) for row in rows]
        if len(samples) > points:
            samples = _thin(samples, since, (until - since) / points)
        return _series(samples, names)

    def class_mix(self, device: DeviceId, *, since: float, until: float) -> dict[str, float]:
        rows = self._fetch(
            "SELECT substr(sample.key, 7) AS class, total(sample.value) AS count"
            " FROM message, json_each(body) AS sample"
            f" WHERE kind = 'telemetry' AND device_id = {_OF_DEVICE} AND time BETWEEN ? AND ?"
            " AND sample.key GLOB 'class/*' GROUP BY sample.key ORDER BY count DESC",
            *(device.site, device.device, since, until),
        )
        return {row["class"]: row["count"] for row in rows}

    def events(self, device: DeviceId, *, limit: int = 100) -> list[EventRow]:
        rows = self._fetch(
            "SELECT message.*, boot.boot FROM message JOIN boot ON boot.id = message.boot_id"
            f" WHERE kind != 'telemetry' AND message.device_id = {_OF_DEVICE}"
            " ORDER BY time DESC, sequence DESC LIMIT ?",
            *(device.site, device.device, limit),
        )
        return [EventRow(event=_event(row), received=row["received"]) for row in rows]

    def events_since(self, received: float) -> list[tuple[DeviceId, EventRow]]:
        rows = self._fetch(
            "SELECT message.*, boot.boot, site, device.device FROM message JOIN boot ON boot.id = message.boot_id"
            " JOIN device ON device.id = message.device_id"
            " WHERE kind != 'telemetry' AND message.received >= ? ORDER BY message.received",
            received,
        )
        return [
            (DeviceId(row["site"], row["device"]), EventRow(event=_event(row), received=row["received"]))
            for row in rows
        ]

    def reply(self, device: DeviceId, command: str) -> Reply | None:
        where = f"device_id = {_OF_DEVICE} AND command = ?"
        rows = self._fetch(f"SELECT body FROM reply WHERE {where}", device.site, device.device, command)
        return from_table(Reply, json.loads(rows[0]["body"]), where=f"stored reply of {device}") if rows else None

    def gaps(self, device: DeviceId, *, limit: int = 100) -> list[Gap]:
        rows = self._fetch(
            "SELECT boot.boot, first, last, missing, watched, opened, closed FROM gap JOIN boot ON boot.id = boot_id"
            f" WHERE gap.device_id = {_OF_DEVICE} ORDER BY gap.id DESC LIMIT ?",
            *(device.site, device.device, limit),
        )
        return [Gap(**{**dict(row), "watched": bool(row["watched"])}) for row in rows]

    def quarantined(self, device: DeviceId | None = None, *, limit: int = 100) -> list[Quarantined]:
        where, values = ("WHERE site = ? AND device = ?", (device.site, device.device)) if device else ("", ())
        columns = "topic, reason, payload, payload_bytes, seen, first_seen, last_seen"
        rows = self._fetch(
            f"SELECT {columns} FROM quarantine {where} ORDER BY last_seen DESC, id DESC LIMIT ?", *values, limit
        )
        return [Quarantined(**dict(row)) for row in rows]

    def quarantined_total(self) -> int:
        return int(self._fetch("SELECT total(count) FROM quarantine_count")[0][0])


def _device_row(row: sqlite3.Row) -> DeviceRow:
    device = DeviceId(row["site"], row["device"])
    state = from_table(State, json.loads(row["state"]), where=f"stored state of {device}") if row["state"] else None
    return DeviceRow(
        device=device,
        status=row["status"],
        boot=row["boot_name"],
        state=state,
        latest=json.loads(row["latest"]),
        recent_latency_s=tuple(json.loads(row["recent"])),
        missing=int(row["missing"]),
        unwatched=int(row["unwatched"]),
        **{name: row[name] for name in _PLAIN_COLUMNS},
    )


def _event(row: sqlite3.Row) -> Event:
    data = json.loads(row["body"])
    return Event(kind=row["kind"], boot=row["boot"], sequence=row["sequence"], time=row["time"], data=data)


Sample = tuple[float, dict[str, float]]


def _thin(samples: list[Sample], since: float, width_s: float) -> list[Sample]:
    """Merge samples in equal time slots: the mean for typical values, the maximum for those where the worst matters."""
    slots: dict[int, list[Sample]] = {}
    for sample in samples:
        slots.setdefault(int((sample[0] - since) / width_s), []).append(sample)
    return [_merge(slot) for _, slot in sorted(slots.items())]


def _merge(slot: list[Sample]) -> Sample:
    columns: dict[str, list[float]] = {}
    for _, values in slot:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    merged = {name: sum(c) / len(c) if name in MEANS else max(c) for name, c in columns.items()}
    return sum(time for time, _ in slot) / len(slot), merged


def _series(samples: list[Sample], names: tuple[str, ...]) -> Series:
    samples = _mark_silences(samples)
    present = [name for name in names if any(name in values for _, values in samples)]
    return Series(
        times=[time for time, _ in samples],
        values={name: [values.get(name) for _, values in samples] for name in present},
    )


def _mark_silences(samples: list[Sample]) -> list[Sample]:
    if len(samples) < 3:
        return samples
    pairs = list(itertools.pairwise(samples))
    steps = sorted(after[0] - before[0] for before, after in pairs)
    limit = SILENCE_FACTOR * steps[len(steps) // 2]
    marked = [samples[0]]
    for before, after in pairs:
        if after[0] - before[0] > limit > 0:
            marked.append(((before[0] + after[0]) / 2, {}))
        marked.append(after)
    return marked
