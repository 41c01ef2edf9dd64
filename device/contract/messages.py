"""MQTT payloads: birth and will, SenML telemetry (RFC 8428), CloudEvents 1.0 events, commands and replies.

Both ends use these functions: a device builds, the host parses, and every parser refuses what its builder would not
have written. Telemetry and events carry boot id, sequence number and schema version, so that a receiver sees gaps and
duplicates; one counter per boot runs over both kinds, starting at 1.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import field
from datetime import UTC, datetime
from typing import Any, TypeVar

from device.contract.errors import BAD_FRAME_REASONS, MessageError
from device.contract.record import record
from device.contract.records import from_table, to_table
from device.contract.senml import RELATIVE_BELOW, Record, resolve
from device.contract.topics import DeviceId

T = TypeVar("T")

SCHEMA_VERSION = 1
MAX_PAYLOAD_BYTES = 1 << 20
MAX_FRAME_PAYLOAD_BYTES = MAX_PAYLOAD_BYTES
"""Of one picture on a board's topic `frame`: a JPEG of several megapixels, or 640x480 raw RGB."""
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
    "migrated",
    "error",
)
VERBS = (
    *("learn", "undo", "update", "rollback"),
    *("set-sampling", "snapshot", "rebirth", "diagnostics", "status"),
)
"""What a device can be told; `device/contract/commands.py` has their arguments."""

# Telemetry measurements and their SenML units (RFC 8428 section 12.1, RFC 8798 for B). Class counts are `class/LABEL-INDEX`.
UNITS = {
    "latency/p50": "s",
    "latency/p90": "s",
    "latency/p99": "s",
    "throughput": "Hz",
    "frames": "count",
    "errors": "count",
    **{f"errors/{reason}": "count" for reason in BAD_FRAME_REASONS},
    "frames/dropped": "count",
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
_SOURCE = re.compile(r"fieldvit/[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}/")
_ATTRIBUTE = re.compile(r"[a-z0-9]+")
_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


@record(frozen=True, slots=True, kw_only=True)
class ModelState:
    """The model a device serves."""

    name: str
    version: str
    release: int
    precision: str
    backbone: str


@record(frozen=True, slots=True, kw_only=True)
class State:
    """Birth (`online`) or last will (`offline`); retained.

    `runtime` is the interpreter's package and version, `delegate` what the model runs on.
    """

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
    runtime: str = ""
    delegate: str = ""

    def __post_init__(self) -> None:
        if self.status not in ("online", "offline"):
            raise MessageError(f"state: status must be online or offline, got {self.status!r}")
        _boot(self.boot, "state")
        if self.time is not None:
            _time(self.time, "state")


@record(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """One window of measurements: names of `UNITS` or `class/INDEX` to values."""

    boot: str
    sequence: int
    time: float
    values: dict[str, float]


@record(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, and why."""

    kind: str
    boot: str
    sequence: int
    time: float
    data: dict[str, Any]


@record(frozen=True, slots=True, kw_only=True)
class Command:
    """An order to one device; it must be answered once, and is void after `expires` (Unix seconds)."""

    id: str
    verb: str
    expires: float
    arguments: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION


@record(frozen=True, slots=True, kw_only=True)
class Reply:
    """The one answer to a command."""

    id: str
    ok: bool
    schema: int = SCHEMA_VERSION
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@record(frozen=True, slots=True, kw_only=True)
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
    """Write a SenML pack; the base record carries name and time, then boot, seq and schema, then the values.

    A clock that shows a year before 1978 was never set. SenML would take such a time for seconds from now, so 0 is sent,
    which means "now".
    """
    time = telemetry.time if telemetry.time >= RELATIVE_BELOW else 0.0
    base = {"bn": f"fieldvit/{device}/", "bt": time, "n": "boot", "vs": telemetry.boot}
    records: list[dict[str, Any]] = [base, {"n": "seq", "v": telemetry.sequence}, {"n": "schema", "v": SCHEMA_VERSION}]
    for name, value in telemetry.values.items():
        if not math.isfinite(value):
            raise MessageError(f"telemetry: {name} is {value}; SenML holds finite numbers only")
        records.append({"n": name, "u": _unit(name), "v": value})
    return _dump(records)


def decode_telemetry(payload: bytes, *, sender: DeviceId | None = None) -> Telemetry:
    """Read a SenML pack with the content that `encode_telemetry` gives it, however it is divided into bases and records.

    Args:
        payload: the message.
        sender: whose topic it came on; None: anybody's.

    Returns:
        The window; `time` is 0 where the device's clock was not set.

    Raises:
        MessageError: names what is wrong.
    """
    records = resolve(_load(payload, "telemetry"))
    prefix = _prefix(records[0].name if records else "", sender)
    by_name: dict[str, Record] = {}
    for item in records:
        if not item.name.startswith(prefix):
            raise MessageError(f"telemetry: record {item.name[:80]!r} is not of {prefix!r}")
        if item.time != records[0].time:
            raise MessageError(f"telemetry: record {item.name[:80]!r} has another time than the first")
        name = item.name.removeprefix(prefix)
        if name in by_name:
            raise MessageError(f"telemetry: record {name[:80]!r} is there twice")
        by_name[name] = item
    missing = [name for name in ("boot", "seq", "schema") if name not in by_name]
    if missing:
        raise MessageError(f"telemetry: record {missing[0]!r} is missing")
    boot = _boot(by_name.pop("boot").value, "telemetry")
    sequence = _sequence(by_name.pop("seq").value, "telemetry")
    _require_schema(by_name.pop("schema").value, "telemetry")
    time = _time(records[0].time, "telemetry")
    if 0 < time < RELATIVE_BELOW:
        raise MessageError(f"telemetry: time {time} is neither now nor after 1978")
    values = {name: _measurement(record, name) for name, record in by_name.items()}
    return Telemetry(boot=boot, sequence=sequence, time=time, values=values)


def _measurement(record: Record, name: str) -> float:
    if record.unit != _unit(name):
        raise MessageError(f"telemetry: record {name!r} has unit {record.unit!r}"[:200])
    if record.sum is not None:
        raise MessageError(f"telemetry: record {name!r} has a sum")
    return _number(record.value, f"telemetry: {name}")


def _prefix(name: str, sender: DeviceId | None) -> str:
    """What all names of a pack begin with."""
    found = _SOURCE.match(name)
    if found is None or (sender is not None and found[0] != f"fieldvit/{sender}/"):
        expected = f"fieldvit/{sender or 'SITE/DEVICE'}/"
        raise MessageError(f"telemetry: names must begin with {expected}, got {name[:80]!r}")
    return found[0]


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


def decode_event(payload: bytes, *, sender: DeviceId | None = None) -> Event:
    """Read an event that `encode_event` wrote.

    Args:
        payload: the message.
        sender: whose topic it came on; None: anybody's.

    Raises:
        MessageError: names what is wrong.
    """
    table = _load(payload, "event")
    _require_cloud_event(table)
    kind = table["type"].removeprefix(EVENT_PREFIX)
    if kind not in EVENT_KINDS or not table["type"].startswith(EVENT_PREFIX):
        raise MessageError(f"event: type {table['type'][:80]!r} is unknown")
    source = table["source"]
    if not _SOURCE.fullmatch(f"{source}/") or (sender is not None and source != f"fieldvit/{sender}"):
        raise MessageError(f"event: source {source[:80]!r} is not fieldvit/{sender or 'SITE/DEVICE'}")
    _require_schema(table.get("schemaversion"), "event")
    boot = _boot(table.get("bootid"), "event")
    number = _typed(table.get("sequence"), str, "event: sequence")
    if not _SEQUENCE.fullmatch(number):
        raise MessageError(f"event: sequence {number[:40]!r} is not a number")
    sequence = _sequence(int(number), "event")
    if table["id"] != f"{boot}-{sequence}":
        raise MessageError(f"event: id {table['id'][:80]!r} is not boot id and sequence")
    return Event(
        kind=kind,
        boot=boot,
        sequence=sequence,
        time=_rfc3339(table.get("time"), "event"),
        data=_typed(table.get("data"), dict, "event: data"),
    )


def _require_cloud_event(table: Any) -> None:
    """CloudEvents 1.0.2 in JSON: sections 2.1 (names), 2.2 (types) and 3.1 (required attributes)."""
    if not isinstance(table, dict) or table.get("specversion") != "1.0":
        raise MessageError("event: expected a CloudEvents 1.0 object")
    for name in ("id", "source", "type"):
        if not isinstance(table.get(name), str) or not table[name]:
            raise MessageError(f"event: {name} must be text, and not empty")
    for name, value in table.items():
        if not _ATTRIBUTE.fullmatch(name):
            raise MessageError(f"event: attribute {name[:40]!r} must be lower-case letters and digits")
        if name != "data" and not isinstance(value, str | bool | int):
            raise MessageError(f"event: attribute {name[:40]!r} must be text, a whole number or true or false")
    if table.get("datacontenttype", "application/json") != "application/json":
        raise MessageError(f"event: datacontenttype {table['datacontenttype']!r} is not application/json"[:200])


def _rfc3339(value: Any, where: str) -> float:
    text = _typed(value, str, f"{where}: time")
    if not _TIMESTAMP.fullmatch(text):
        raise MessageError(f"{where}: time {text[:40]!r} is not RFC 3339")
    try:
        moment = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise MessageError(f"{where}: time {text[:40]!r} is not RFC 3339") from error
    return _time(moment, where)


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
