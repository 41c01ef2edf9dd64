"""MQTT payloads: birth and will, SenML telemetry (RFC 8428), CloudEvents 1.0 events, commands and replies.

Both ends use these functions: a device builds, the host parses, and every parser refuses what its builder would not
have written. Telemetry and events carry boot id, sequence number and schema version, so that a receiver sees gaps and
duplicates; one counter per boot runs over both kinds, starting at 1.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from device.contract.errors import MessageError
from device.contract.records import from_table, to_table
from device.contract.topics import DeviceId

T = TypeVar("T")

SCHEMA_VERSION = 1
MAX_PAYLOAD_BYTES = 1 << 20
EVENT_PREFIX = "io.fieldvit."
EVENT_KINDS = (
    "downloaded",
    "installed",
    "confirmed",
    "rolled-back",
    "refused",
    "drift",
    "learned",
    "unlearned",
    "error",
)

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
MAX_SEQUENCE = 2**53  # what JSON numbers hold exactly
MAX_TIME = 253402300800.0  # the year 10000, in Unix seconds
_BOOT = re.compile(r"[!-~]{1,128}")
_SEQUENCE = re.compile(r"[0-9]{1,16}")
_CLASS = re.compile(r"class/[0-9]{1,6}")


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
        _boot(self.boot, "state")
        if self.time is not None:
            _time(self.time, "state")


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

    def __post_init__(self) -> None:
        _time(self.time, "result")


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
    by_name = {record["n"]: record for record in records if isinstance(record.get("n"), str)}
    boot = _boot(by_name.get("boot", {}).get("vs"), "telemetry")
    sequence = _sequence(by_name.get("seq", {}).get("v"), "telemetry")
    _require_schema(by_name.get("schema", {}).get("v"), "telemetry")
    time = _time(records[0].get("bt"), "telemetry")
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
    if not _SEQUENCE.fullmatch(sequence):
        raise MessageError(f"event: sequence {sequence[:40]!r} is not a number")
    try:
        time = datetime.fromisoformat(_typed(table.get("time"), str, "event: time")).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise MessageError(f"event: time {table.get('time')!r} is not RFC 3339") from error
    return Event(
        kind=kind,
        boot=_boot(table.get("bootid"), "event"),
        sequence=_sequence(int(sequence), "event"),
        time=_time(time, "event"),
        data=_typed(table.get("data"), dict, "event: data"),
    )


def _unit(name: str) -> str:
    if _CLASS.fullmatch(name):
        return "count"
    if name not in UNITS:
        raise MessageError(f"telemetry: {name!r} is not a known measurement")
    return UNITS[name]


def _decode_record(cls: type[T], payload: bytes, where: str) -> T:
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
        return json.loads(payload, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{where}: not JSON ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MessageError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MessageError(f"{where}: expected a number, got {value!r}"[:200])
    try:
        number = float(value)
    except OverflowError as error:
        raise MessageError(f"{where}: the number is too large") from error
    if not math.isfinite(number):
        raise MessageError(f"{where}: expected a finite number, got {number}")
    return number


def _boot(value: Any, where: str) -> str:
    boot: str = _typed(value, str, f"{where}: boot id")
    if not _BOOT.fullmatch(boot):
        raise MessageError(f"{where}: boot id {boot[:40]!r} must be 1 to 128 printable characters")
    return boot


def _sequence(value: Any, where: str) -> int:
    sequence: int = _typed(value, int, f"{where}: sequence")
    if not 1 <= sequence <= MAX_SEQUENCE:
        raise MessageError(f"{where}: sequence must be 1..2^53")
    return sequence


def _time(value: Any, where: str) -> float:
    time = _number(value, f"{where}: time")
    if not 0 <= time < MAX_TIME:
        raise MessageError(f"{where}: time {time} is not between 1970 and 9999")
    return time
