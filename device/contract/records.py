"""Strict building of frozen dataclasses from TOML or JSON tables: unknown key, missing key, wrong type = one clear error.

Every configuration, board profile, recipe and manifest is read through `from_table`, so all of them refuse the same
mistakes with the same words. Defaults live in the dataclasses and nowhere else.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from device.contract.errors import ConfigError

T = TypeVar("T")


def from_table(cls: type[T], table: Mapping[str, Any], *, where: str, error: type[Exception] = ConfigError) -> T:
    """Build `cls` from a table, nested dataclasses included.

    Args:
        cls: a dataclass whose annotations are scalars, `tuple[X, ...]`, `dict[str, X]`, `X | None` or dataclasses.
        table: parsed TOML or JSON.
        where: the name of the table for messages, for example "agent.toml [broker]".
        error: what to raise.

    Raises:
        error: a key is unknown or missing, or a value has the wrong type. Range errors come from `__post_init__`.
    """
    if not isinstance(table, Mapping):
        raise error(f"{where}: expected a table, got {type(table).__name__}")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]  # every caller passes a dataclass
    unknown = sorted(table.keys() - known.keys())
    if unknown:
        raise error(f"{where}: unknown key {', '.join(map(repr, unknown))}; known keys are {', '.join(sorted(known))}")
    missing = [n for n, f in known.items() if n not in table and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise error(f"{where}: missing key {', '.join(map(repr, missing))}; add it")
    hints = get_type_hints(cls)
    inside = f"{where}: " if where.endswith(".toml") else f"{where}."  # a.toml.source would read as a file's name
    values = {name: _convert(hints[name], value, inside + name, error) for name, value in table.items()}
    return cls(**values)


def to_table(record: Any) -> Any:
    """Turn a dataclass into plain dicts, lists and scalars; the inverse of `from_table`."""
    if is_dataclass(record):
        return {field.name: to_table(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, Mapping):
        return {key: to_table(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [to_table(item) for item in record]
    return record


def _convert(hint: Any, value: Any, where: str, error: type[Exception]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert(hint, value, where, error)
    if is_dataclass(hint):
        return from_table(hint, value, where=where, error=error)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise error(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", error) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise error(f"{where}: expected a table, got {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}", error) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as too_large:
            raise error(f"{where}: the number is too large") from too_large
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise error(f"{where}: must be a finite number, got {value}")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise error(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
