"""What the page asks of the store; reads only, of what is committed."""

import itertools
import json
import math
from functools import lru_cache

from device.contract.messages import Event, Reply, State
from device.contract.records import from_table
from device.contract.topics import DeviceId
from host.monitor.aggregates import Aggregate, put_together, shown_as
from host.monitor.changes import storable
from host.monitor.database import Database, Row
from host.monitor.rows import DeviceRow, EventRow, Gap, Quarantined, Series
from host.monitor.spans import AS_IT_CAME, HOUR, MINUTE, Piece, choose_width, pieces

MAX_ROWS = 20_000  # telemetry messages read for one chart; beyond it minutes are read
SILENCE_FACTOR = 4.0  # a pause this many times the usual interval interrupts the line

_DEVICES = """
SELECT device.*, boot.boot AS boot_name, coalesce(quarantine_count.count, 0) AS quarantined
FROM device LEFT JOIN boot ON boot.id = device.boot_id LEFT JOIN quarantine_count
    ON quarantine_count.site = device.site AND quarantine_count.device = device.device
"""
_PLAIN_COLUMNS = ("first_seen", "last_seen", "latest_time", "received", "duplicates", "quarantined")
_OF_DEVICE = "(SELECT id FROM device WHERE site = ? AND device = ?)"
_TELEMETRY = "FROM message WHERE kind = 'telemetry' AND device_id = ? AND time >= ? AND time < ?"


class SqlQueries:
    """The reading half of `Store`."""

    def __init__(self, database: Database) -> None:
        self._read = database.read

    def devices(self) -> list[DeviceRow]:
        rows = [_device_row(row) for row in self._read(_DEVICES)]
        return sorted(rows, key=lambda row: (row.device.site, row.device.device))  # a server sorts by its language

    def device(self, device: DeviceId) -> DeviceRow | None:
        rows = self._read(_DEVICES + "WHERE device.site = ? AND device.device = ?", device.site, device.device)
        return _device_row(rows[0]) if rows else None

    def telemetry(
        self, device: DeviceId, names: tuple[str, ...], *, since: float, until: float, points: int = 600
    ) -> Series:
        windows, width_s = self._windows(device, since, until)
        slot_s = (until - since) / points
        if width_s:
            slot_s = math.ceil(slot_s / width_s) * width_s  # a minute or hour lies within one slot
        elif len(windows) <= points:
            slot_s = 0.0
        return _series(_slots(windows, slot_s) if slot_s else windows, names, slot_s)

    def class_mix(self, device: DeviceId, *, since: float, until: float) -> dict[str, float]:
        windows, _ = self._windows(device, since, until)
        counts = put_together(windows).classes()
        return dict(sorted(counts.items(), key=lambda item: (-item[1], int(item[0]))))

    def events(self, device: DeviceId, *, limit: int = 100) -> list[EventRow]:
        rows = self._read(
            "SELECT message.*, boot.boot FROM message JOIN boot ON boot.id = message.boot_id"
            f" WHERE kind != 'telemetry' AND message.device_id = {_OF_DEVICE}"
            " ORDER BY time DESC, boot_id DESC, sequence DESC LIMIT ?",
            *(device.site, device.device, limit),
        )
        return [EventRow(event=_event(row), received=row["received"]) for row in rows]

    def events_since(self, received: float) -> list[tuple[DeviceId, EventRow]]:
        rows = self._read(
            "SELECT message.*, boot.boot, site, device.device FROM message JOIN boot ON boot.id = message.boot_id"
            " JOIN device ON device.id = message.device_id"
            " WHERE kind != 'telemetry' AND message.received >= ? ORDER BY message.received, boot_id, sequence",
            received,
        )
        return [
            (DeviceId(row["site"], row["device"]), EventRow(event=_event(row), received=row["received"]))
            for row in rows
        ]

    def reply(self, device: DeviceId, command: str) -> Reply | None:
        where = f"device_id = {_OF_DEVICE} AND command = ?"
        rows = self._read(f"SELECT body FROM reply WHERE {where}", device.site, device.device, storable(command))
        return from_table(Reply, json.loads(rows[0]["body"]), where=f"stored reply of {device}") if rows else None

    def gaps(self, device: DeviceId, *, limit: int = 100) -> list[Gap]:
        rows = self._read(
            "SELECT boot.boot, first, last, missing, watched, opened, closed FROM gap JOIN boot ON boot.id = boot_id"
            f" WHERE gap.device_id = {_OF_DEVICE} ORDER BY gap.id DESC LIMIT ?",
            *(device.site, device.device, limit),
        )
        return [Gap(**{**dict(row), "watched": bool(row["watched"])}) for row in rows]

    def quarantined(self, device: DeviceId | None = None, *, limit: int = 100) -> list[Quarantined]:
        where, values = ("WHERE site = ? AND device = ?", (device.site, device.device)) if device else ("", ())
        columns = "topic, reason, payload, payload_bytes, seen, first_seen, last_seen"
        rows = self._read(
            f"SELECT {columns} FROM quarantine {where} ORDER BY last_seen DESC, id DESC LIMIT ?", *values, limit
        )
        return [Quarantined(**dict(row)) for row in rows]

    def quarantined_total(self) -> int:
        (row,) = self._read("SELECT coalesce(sum(count), 0) AS total FROM quarantine_count")
        return int(row["total"])

    def _windows(self, device: DeviceId, since: float, until: float) -> tuple[list[Aggregate], int]:
        """What was measured in `since..until`, in order of time, and the seconds that most of its rows stand for."""
        rows = self._read("SELECT * FROM device WHERE site = ? AND device = ?", device.site, device.device)
        if not rows:
            return [], AS_IT_CAME
        device_id = rows[0]["id"]
        kept_since = {AS_IT_CAME: rows[0]["telemetry_since"], MINUTE: rows[0]["minutes_since"], HOUR: -math.inf}
        after = math.nextafter(until, math.inf)
        width_s = choose_width(until - since, since, kept_since)
        if width_s == AS_IT_CAME and self._count(device_id, since, after) > MAX_ROWS:
            width_s = MINUTE
        parts = pieces(since, after, width_s, kept_since)
        return [window for piece in parts for window in self._piece(device_id, piece)], width_s

    def _count(self, device_id: int, since: float, after: float) -> int:
        (row,) = self._read(f"SELECT count(*) AS messages {_TELEMETRY}", device_id, since, after)
        return int(row["messages"])

    def _piece(self, device_id: int, piece: Piece) -> list[Aggregate]:
        if piece.width_s == AS_IT_CAME:
            rows = self._read(
                f"SELECT time, body {_TELEMETRY} ORDER BY time, boot_id, sequence", device_id, piece.since, piece.until
            )
            return [Aggregate.of(row["time"], json.loads(row["body"])) for row in rows]
        rows = self._read(
            "SELECT names, numbers FROM rollup WHERE device_id = ? AND width_s = ? AND start >= ? AND start < ? ORDER BY start",
            *(device_id, piece.width_s, piece.since, piece.until),
        )
        return [Aggregate.load(row["names"], row["numbers"]) for row in rows]


def _device_row(row: Row) -> DeviceRow:
    device = DeviceId(row["site"], row["device"])
    return DeviceRow(
        device=device,
        status=row["status"],
        boot=row["boot_name"],
        state=_state(row["state"]) if row["state"] else None,
        latest=json.loads(row["latest"]),
        recent_latency_s=tuple(json.loads(row["recent"])),
        missing=int(row["missing"]),
        unwatched=int(row["unwatched"]),
        **{name: row[name] for name in _PLAIN_COLUMNS},
    )


@lru_cache(maxsize=16_384)  # births are rare, and the fleet page asks for all of them each time
def _state(text: str) -> State:
    return from_table(State, json.loads(text), where="stored state")


def _event(row: Row) -> Event:
    data = json.loads(row["body"])
    return Event(kind=row["kind"], boot=row["boot"], sequence=row["sequence"], time=row["time"], data=data)


def _slots(windows: list[Aggregate], width_s: float) -> list[Aggregate]:
    """Put windows together in equal slots of time, counted from 1970 on, so that a minute never falls into two."""
    slots = itertools.groupby(windows, key=lambda window: math.floor(window.time / width_s))
    return [put_together(slot) for _, slot in slots]


Sample = tuple[float, dict[str, float]]


def _series(windows: list[Aggregate], names: tuple[str, ...], resolution_s: float) -> Series:
    samples = _mark_silences([(window.time, window.shown()) for window in windows])
    present = [name for name in names if any(name in values for _, values in samples)]
    return Series(
        times=[time for time, _ in samples],
        values={name: [values.get(name) for _, values in samples] for name in present},
        resolution_s=resolution_s,
        shown_as={name: shown_as(name) for name in present} if resolution_s else {},
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
