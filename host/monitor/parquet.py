"""A store as Parquet files: telemetry, events and devices, for what reads tables (DuckDB, pandas, Spark).

Telemetry has a column for each measurement of the contract, null where a window has none, and the class counts as a map from
index to count. Times are UTC to the microsecond: `time` by the device's clock, `received` by the monitor's. What retention has
forgotten is not there. Rows are read and written in chunks, so a large store needs no large memory.
"""

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from device.contract.messages import CLASS_PREFIX, UNITS
from host.errors import MonitorError
from host.monitor.database import Database, Row

CHUNK_ROWS = 5000
_MESSAGES = (
    "SELECT site, device, boot.boot, sequence, kind, time, message.received, body"
    " FROM message JOIN boot ON boot.id = message.boot_id JOIN device ON device.id = message.device_id"
    " WHERE kind {} 'telemetry'"
)
_TELEMETRY, _EVENTS = _MESSAGES.format("="), _MESSAGES.format("!=")
_DEVICES = (
    "SELECT site, device.device, boot.boot, status, state, first_seen, last_seen, received, duplicates, missing, unwatched"
    " FROM device LEFT JOIN boot ON boot.id = device.boot_id"
)
LAST_MICROSECOND = 253402300799_999999  # of the year 9999, the last that Parquet's readers take


def export_parquet(database: Database, directory: Path) -> dict[str, int]:
    """Write telemetry.parquet, events.parquet and devices.parquet into a new directory; all or none.

    Returns:
        Rows of each file.

    Raises:
        MonitorError: pyarrow is missing, the directory exists or cannot be written, or the store cannot be read.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MonitorError(f"Parquet needs pyarrow ({error}); pip install 'fieldvit[parquet]'") from error
    if directory.exists():
        raise MonitorError(f"{directory}: exists already; name a new directory")
    partial = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        rows = {
            name: _write(partial / f"{name}.parquet", database.stream(sql, rows=CHUNK_ROWS), schema(pyarrow), to_row)
            for name, sql, schema, to_row in (
                ("telemetry", _TELEMETRY, _telemetry_schema, _telemetry_row),
                ("events", _EVENTS, _event_schema, _event_row),
                ("devices", _DEVICES, _device_schema, _device_row),
            )
        }
        partial.rename(directory)
    except (OSError, pyarrow.ArrowException) as error:
        raise MonitorError(f"{directory}: cannot be written ({error}); free disk space there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return rows


def _write(path: Path, chunks: Generator[list[Row]], schema: Any, to_row: Callable[[Row], dict[str, Any]]) -> int:
    import pyarrow
    import pyarrow.parquet

    count = 0
    with closing(chunks), pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for chunk in chunks:
            writer.write_table(pyarrow.Table.from_pylist([to_row(row) for row in chunk], schema=schema))
            count += len(chunk)
    return count


def _telemetry_schema(pyarrow: Any) -> Any:
    columns = [(name, pyarrow.float64()) for name in UNITS]
    return pyarrow.schema(
        [*_number_columns(pyarrow), *columns, ("classes", pyarrow.map_(pyarrow.int32(), pyarrow.float64()))]
    )


def _event_schema(pyarrow: Any) -> Any:
    return pyarrow.schema([*_number_columns(pyarrow), ("kind", pyarrow.string()), ("data", pyarrow.string())])


def _device_schema(pyarrow: Any) -> Any:
    text, count = pyarrow.string(), pyarrow.int64()
    time = pyarrow.timestamp("us", tz="UTC")
    return pyarrow.schema(
        [
            *((name, text) for name in ("site", "device", "boot", "status", "state")),
            *((name, time) for name in ("first_seen", "last_seen")),
            *((name, count) for name in ("received", "duplicates", "missing", "unwatched")),
        ]
    )


def _number_columns(pyarrow: Any) -> list[tuple[str, Any]]:
    text, time = pyarrow.string(), pyarrow.timestamp("us", tz="UTC")
    return [
        *((name, text) for name in ("site", "device", "boot")),
        ("sequence", pyarrow.int64()),
        *((name, time) for name in ("time", "received")),
    ]


def _number_row(row: Row) -> dict[str, Any]:
    names = ("site", "device", "boot", "sequence")
    return {**{name: row[name] for name in names}, **_times(row, "time", "received")}


def _telemetry_row(row: Row) -> dict[str, Any]:
    values = json.loads(row["body"])
    classes = [(int(n.removeprefix(CLASS_PREFIX)), v) for n, v in values.items() if n.startswith(CLASS_PREFIX)]
    return {**values, **_number_row(row), "classes": classes}


def _event_row(row: Row) -> dict[str, Any]:
    return {**_number_row(row), "kind": row["kind"], "data": row["body"]}


def _device_row(row: Row) -> dict[str, Any]:
    return {
        **dict(row),
        "missing": int(row["missing"]),
        "unwatched": int(row["unwatched"]),
        **_times(row, "first_seen", "last_seen"),
    }


def _times(row: Row, *names: str) -> dict[str, int]:
    return {name: min(round(row[name] * 1e6), LAST_MICROSECOND) for name in names}
