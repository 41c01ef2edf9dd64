"""MQTT payloads: birth and will, SenML telemetry (RFC 8428), CloudEvents 1.0 events, commands and replies.

Both ends use these functions: a device builds, the host parses, and every parser refuses what its builder would not
have written. Telemetry and events carry boot id, sequence number and schema version, so that a receiver sees gaps and
duplicates; one counter per boot runs over both kinds, starting at 1.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from device.contract.errors import MessageError
from device.contract.records import from_table, to_table
from device.contract.topics import DeviceId

SCHEMA_VERSION = 1
MAX_PAYLOAD_BYTES = 1 << 20
EVENT_PREFIX = "io.fieldvit."
EVENT_KINDS = ("installed", "confirmed", "rolled-back", "refused", "drift", "learned", "unlearned", "error")

# Telemetry measurements and their SenML units (RFC 8428 section 12.1, RFC 8798 for B). Class counts are `class/LABEL-INDEX`.
UNITS = {
    "latency/p50": "s",
    "latency/p90": "s",
    "latency/p99": "s",
    "throughput": "Hz",
    "frames": "count",
    "errors": "count",
    "confidence": "/",
    "drift": "/",
    "memory": "B",
    "temperature": "Cel",
    "spool/depth": "count",
    "spool/dropped": "count",
    "learned/version": "count",
}
CLASS_PREFIX = "class/"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """The model a device serves."""

    name: str
    version: str
    release: int
    precision: str
    backbone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Birth (`online`) or last will (`offline`); retained."""

    status: str
    boot: str
    schema: int = SCHEMA_VERSION
    time: float | None = None
    agent_version: str | None = None
    board: str | None = None
    slot: str | None = None
    model: ModelState | None = None
    labels: tuple[str, ...] = ()
    learned_version: int = 0
    forbidden_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in ("online", "offline"):
            raise MessageError(f"state: status must be online or offline, got {self.status!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """One window of measurements: names of `UNITS` or `class/INDEX` to values."""

    boot: str
    sequence: int
    time: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, and why."""

    kind: str
    boot: str
    sequence: int
    time: float
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """An order to one device; it must be answered once, and is void after `expires` (Unix seconds)."""

    id: str
    verb: str
    expires: float
    arguments: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The one answer to a command."""

    id: str
    ok: bool
    schema: int = SCHEMA_VERSION
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One inference, when the operator turned results on."""

    frame_id: str
    label: str
    confidence: float
    time: float
    schema: int = SCHEMA_VERSION


def encode_state(state: State) -> bytes:
    return _dump(to_table(state))


def decode_state(payload: bytes) -> State:
    return _decode_record(State, payload, "state")


def encode_command(command: Command) -> bytes:
    return _dump(to_table(command))


def decode_command(payload: bytes) -> Command:
    return _decode_record(Command, payload, "command")


def encode_reply(reply: Reply) -> bytes:
    return _dump(to_table(reply))


def decode_reply(payload: bytes) -> Reply:
    return _decode_record(Reply, payload, "reply")


def encode_result(result: Result) -> bytes:
    return _dump(to_table(result))


def decode_result(payload: bytes) -> Result:
    return _decode_record(Result, payload, "result")


def encode_telemetry(device: DeviceId, telemetry: Telemetry) -> bytes:
    """Write a SenML pack; the base record carries name and time, then boot, seq and schema, then the values."""
    base = {"bn": f"fieldvit/{device}/", "bt": telemetry.time, "n": "boot", "vs": telemetry.boot}
    records: list[dict[str, Any]] = [base, {"n": "seq", "v": telemetry.sequence}, {"n": "schema", "v": SCHEMA_VERSION}]
    for name, value in telemetry.values.items():
        if not math.isfinite(value):
            raise MessageError(f"telemetry: {name} is {value}; SenML holds finite numbers only")
        records.append({"n": name, "u": _unit(name), "v": value})
    return _dump(records)


def decode_telemetry(payload: bytes) -> Telemetry:
    """Read a pack that `encode_telemetry` wrote; MessageError names what is wrong."""
    records = _load(payload, "telemetry")
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise MessageError("telemetry: expected a SenML pack, a list of records")
    by_name = {record.get("n"): record for record in records}
    boot = _typed(by_name.get("boot", {}).get("vs"), str, "telemetry: boot")
    sequence = _typed(by_name.get("seq", {}).get("v"), int, "telemetry: seq")
    _require_schema(by_name.get("schema", {}).get("v"), "telemetry")
    time = _number(records[0].get("bt"), "telemetry: bt")
    values = {}
    for record in records:
        name = record.get("n")
        if name in ("boot", "seq", "schema"):
            continue
        if not isinstance(name, str) or record.get("u") != _unit(name):
            raise MessageError(f"telemetry: record {name!r} has unit {record.get('u')!r}")
        values[name] = _number(record.get("v"), f"telemetry: {name}")
    return Telemetry(boot=boot, sequence=sequence, time=time, values=values)


def encode_event(device: DeviceId, event: Event) -> bytes:
    """Write a CloudEvents 1.0 envelope in JSON format."""
    if event.kind not in EVENT_KINDS:
        raise MessageError(f"event kind {event.kind!r} is unknown; kinds are {', '.join(EVENT_KINDS)}")
    return _dump(
        {
            "specversion": "1.0",
            "id": f"{event.boot}-{event.sequence}",
            "source": f"fieldvit/{device}",
            "type": EVENT_PREFIX + event.kind,
            "time": datetime.fromtimestamp(event.time, UTC).isoformat(),
            "datacontenttype": "application/json",
            "bootid": event.boot,
            "sequence": str(event.sequence),
            "schemaversion": str(SCHEMA_VERSION),
            "data": event.data,
        }
    )


def decode_event(payload: bytes) -> Event:
    """Read an event that `encode_event` wrote; MessageError names what is wrong."""
    table = _load(payload, "event")
    if not isinstance(table, dict) or table.get("specversion") != "1.0":
        raise MessageError("event: expected a CloudEvents 1.0 object")
    kind = _typed(table.get("type"), str, "event: type").removeprefix(EVENT_PREFIX)
    if kind not in EVENT_KINDS:
        raise MessageError(f"event: type {table['type']!r} is unknown")
    _require_schema(table.get("schemaversion"), "event")
    sequence = _typed(table.get("sequence"), str, "event: sequence")
    if not sequence.isdecimal() or not sequence.isascii():
        raise MessageError(f"event: sequence {sequence!r} is not a number")
    try:
        time = datetime.fromisoformat(_typed(table.get("time"), str, "event: time")).timestamp()
    except ValueError as error:
        raise MessageError(f"event: time {table.get('time')!r} is not RFC 3339") from error
    return Event(
        kind=kind,
        boot=_typed(table.get("bootid"), str, "event: bootid"),
        sequence=int(sequence),
        time=time,
        data=_typed(table.get("data"), dict, "event: data"),
    )


def _unit(name: str) -> str:
    if name.startswith(CLASS_PREFIX):
        return "count"
    if name not in UNITS:
        raise MessageError(f"telemetry: {name!r} is not a known measurement")
    return UNITS[name]


def _decode_record(cls: type[Any], payload: bytes, where: str) -> Any:
    table = _load(payload, where)
    _require_schema(table.get("schema") if isinstance(table, Mapping) else None, where)
    return from_table(cls, table, where=where, error=MessageError)


def _require_schema(value: object, where: str) -> None:
    if str(value) != str(SCHEMA_VERSION):
        raise MessageError(f"{where}: schema {value!r} is not {SCHEMA_VERSION}, the one this version reads")


def _load(payload: bytes, where: str) -> Any:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"{where}: {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    try:
        return json.loads(payload, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{where}: not JSON ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MessageError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MessageError(f"{where}: expected a finite number, got {value!r}")
    return float(value)
