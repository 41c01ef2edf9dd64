"""SenML packs in JSON (RFC 8428): checked, and resolved to records that stand for themselves.

Resolving (section 4.6) adds base name, time, unit, value and sum to each record. Fields that this version does not know
are ignored, unless their name ends in `_`, which the RFC reserves for what must be understood.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from device.contract.errors import MessageError
from device.contract.record import record

VERSION = 10
RELATIVE_BELOW = float(2**28)
"""A time below this is in seconds from now (section 4.5.3); the first absolute one is in 1978."""
MAX_RECORDS = 10_000
_BASE = ("bn", "bt", "bu", "bv", "bs", "bver")
_NUMBERS = ("bt", "bv", "bs", "v", "s", "t", "ut")
_TEXTS = ("bn", "bu", "n", "u", "vs", "vd")
_VALUES = ("v", "vs", "vb", "vd")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-:./_]*")


@record(frozen=True, slots=True, kw_only=True)
class Record:
    """One resolved record. `time` is Unix seconds, or seconds from now (0 or less) when below `RELATIVE_BELOW`."""

    name: str
    time: float = 0.0
    unit: str | None = None
    value: float | str | bool | None = None
    sum: float | None = None
    update_time: float | None = None


def resolve(pack: Any, *, now: float | None = None) -> list[Record]:
    """Check and resolve a parsed pack.

    Args:
        pack: a list of tables, as JSON gives it.
        now: Unix seconds that relative times count from; None leaves them relative.

    Raises:
        MessageError: this is no SenML of a version up to 10; the message names the record and the field.
    """
    if not isinstance(pack, list) or not pack:
        raise MessageError("senml: expected a pack, a list of at least one record")
    if len(pack) > MAX_RECORDS:
        raise MessageError(f"senml: {len(pack)} records are over the limit of {MAX_RECORDS}")
    base: dict[str, Any] = {}
    records = []
    for number, fields in enumerate(pack):
        where = f"senml: record {number}"
        _check(fields, where)
        base |= {name: fields[name] for name in _BASE if name in fields}
        _check_version(base, where)
        if any(name in fields for name in (*_VALUES, "s")) or not any(name in fields for name in _BASE):
            records.append(_resolve(fields, base, now, where))
        elif "n" in fields or "u" in fields or "t" in fields:
            raise MessageError(f"{where}: has no value")
    return records


def _check(fields: Any, where: str) -> None:
    if not isinstance(fields, Mapping):
        raise MessageError(f"{where}: expected a table, got {type(fields).__name__}")
    for name, value in fields.items():
        if name in _NUMBERS:
            _require_number(value, f"{where}: {name}")
        elif name in _TEXTS and not isinstance(value, str):
            raise MessageError(f"{where}: {name} must be text, got {value!r}"[:200])
        elif name == "vb" and not isinstance(value, bool):
            raise MessageError(f"{where}: vb must be true or false, got {value!r}"[:200])
        elif name.endswith("_"):
            raise MessageError(f"{where}: field {name!r} must be understood, and is not"[:200])
    if sum(name in fields for name in _VALUES) > 1:
        raise MessageError(f"{where}: has more than one value")


def _check_version(base: Mapping[str, Any], where: str) -> None:
    version = base.get("bver", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or not 0 < version <= VERSION:
        raise MessageError(f"{where}: bver {version!r} is not a version up to {VERSION}"[:200])


def _resolve(fields: Mapping[str, Any], base: Mapping[str, Any], now: float | None, where: str) -> Record:
    name = base.get("bn", "") + fields.get("n", "")
    if not _NAME.fullmatch(name):
        raise MessageError(
            f"{where}: name {name[:80]!r} must be letters, digits and -:./_, and begin with one of the first two"
        )
    value: Any = next((fields[key] for key in _VALUES if key in fields), None)
    if "bv" in base and (value is None or "v" in fields) and ("v" in fields or "s" not in fields):
        value = base["bv"] + (value or 0)
    total = fields.get("s", 0) + base["bs"] if "bs" in base else fields.get("s")
    if value is None and total is None:
        raise MessageError(f"{where}: has no value")
    time = float(base.get("bt", 0) + fields.get("t", 0))
    if now is not None and time < RELATIVE_BELOW:
        time += now
    for number in (time, value, total):
        if isinstance(number, float) and not math.isfinite(number):
            raise MessageError(f"{where}: base and value add up to no finite number")
    return Record(
        name=name,
        time=time,
        unit=fields.get("u", base.get("bu")),
        value=value,
        sum=total,
        update_time=fields.get("ut"),
    )


def _require_number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MessageError(f"{where} must be a number, got {value!r}"[:200])
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an int beyond any float
        is_finite = False
    if not is_finite:
        raise MessageError(f"{where} must be a finite number")
