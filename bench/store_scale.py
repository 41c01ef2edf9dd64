"""What the monitor's store takes and costs with a fleet: SQLite and PostgreSQL, one writer each.

    python -m bench.store_scale [--only STORE]

Each store lies on this machine's disk; PostgreSQL is a server of its own with the settings it comes with, on a socket. Messages are
recorded through `transaction()` in batches of 200, as ingest does, with the values of the contract and ten classes:

- `messages_per_s`: a fleet whose devices speak in turn, so a batch is of 200 devices;
- `devices_s`: `devices()` of that fleet, which the fleet page asks for;
- `timeline_24h_s`, `timeline_30d_s`: the timelines of one device with a message each 10 s, the median of several;
- `mb_per_million_as_it_came`: tables and indexes of that device, rollups too, for each million messages;
- `mb_per_million_rolled_up`: the same when its messages are forgotten, minutes and hours kept. Of SQLite this is the file; a
  PostgreSQL server keeps freed space for later rows, so it is measured after VACUUM FULL.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.jobs import Job, Table, digest_code, main_of
from bench.record import Row
from device.contract.messages import UNITS, State, Telemetry
from device.contract.topics import DeviceId
from host.errors import BenchError
from host.monitor.ingest import BATCH
from host.monitor.retention import DAY_S, Retention
from host.monitor.sql_store import SqlStore
from host.monitor.store import open_database
from host.monitor.views import TIMELINES
from tests.support.postgres import find_postgres, postgres_server

SQLITE, POSTGRES = "SQLite", "PostgreSQL"
BEGIN = 1_700_000_000.0
CLASSES = 10
INTERVAL_S = 10.0
ROOT = Path(__file__).parents[1]
CODE = ("aggregates", "changes", "postgres_database", "retention", "schema", "spans", "sql_queries", "sql_store")

TABLE = Table(
    name="store_scale",
    command="python -m bench.store_scale",
    seed=0,
    data=f"made telemetry: {len(UNITS)} values and {CLASSES} classes a message",
    title="The monitor's store with a fleet",
    notes=lambda rows: _notes(rows),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is recorded."""

    devices: int = 10_000
    rounds: int = 20  # messages of each of them
    days: float = 30.0  # of the one device's history
    repeats: int = 7


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing of the table."""
    return main_of(TABLE, list_jobs, measure, argv, prepare=require_postgres, is_timed=True)


def list_jobs(scale: Scale | None = None) -> list[Job]:
    """One job for each store."""
    names = [*CODE, "sqlite_database"]
    code = digest_code(Path(__file__), *(ROOT / "host" / "monitor" / f"{name}.py" for name in names))
    settings = asdict(scale or Scale())
    keys = [{"store": name, "devices": settings["devices"]} for name in (SQLITE, POSTGRES)]
    return [Job(key=key, settings=settings, defined_by=code) for key in keys]


def require_postgres() -> None:
    """Raise BenchError where PostgreSQL is not installed."""
    if find_postgres() is None:
        raise BenchError("PostgreSQL is not installed; install it (apt install postgresql)")


def measure(job: Job) -> Row:
    """Fill an empty store, and ask it."""
    scale = Scale(**job.settings)
    rng = random.Random(0)
    with _new_store(job.key["store"]) as (store, stored_bytes):
        fleet = [DeviceId("field", f"cam-{n:05d}") for n in range(scale.devices)]
        row = {"messages_per_s": round(_fill(store, _fleet_messages(fleet, scale.rounds, rng)))}
        row["devices_s"] = _median(store.devices, scale.repeats)
    with _new_store(job.key["store"]) as (store, stored_bytes):
        device, messages = DeviceId("field", "cam-1"), int(scale.days * DAY_S / INTERVAL_S)
        _fill(store, ((device, _message(n, BEGIN + n * INTERVAL_S, rng)) for n in range(1, messages + 1)))
        until = BEGIN + messages * INTERVAL_S
        row["history_messages"] = messages
        for name, seconds in (("timeline_24h_s", DAY_S), ("timeline_30d_s", 30 * DAY_S)):
            row[name] = _median(_timeline(store, device, until - seconds, until), scale.repeats)
        row["mb_per_million_as_it_came"] = round(stored_bytes() / messages, 1)  # bytes a message are MB a million
        store.forget(Retention(telemetry_days=1e-9), now=until + 1)
        row["mb_per_million_rolled_up"] = round(stored_bytes() / messages, 1)
    return row


def _timeline(store: SqlStore, device: DeviceId, since: float, until: float) -> Callable[[], Any]:
    return lambda: store.telemetry(device, TIMELINES, since=since, until=until)


def _median(ask: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds), 4)


def _fleet_messages(fleet: list[DeviceId], rounds: int, rng: random.Random) -> Iterator[tuple[DeviceId, Telemetry]]:
    for n in range(1, rounds + 1):
        for device in fleet:
            yield device, _message(n, BEGIN + n * INTERVAL_S, rng)


def _message(sequence: int, moment: float, rng: random.Random) -> Telemetry:
    values = {name: round(rng.uniform(0.01, 1.0), 6) for name in UNITS}
    values |= {f"class/{n}": float(rng.randrange(100)) for n in range(CLASSES)}
    return Telemetry(boot="b1", sequence=sequence, time=moment, values=values)


def _fill(store: SqlStore, messages: Iterator[tuple[DeviceId, Telemetry]]) -> float:
    """Record a birth of each device and all messages; returns messages per second, without what it took to make them."""
    seconds, total, known = 0.0, 0, set()
    while batch := [item for _, item in zip(range(BATCH), messages, strict=False)]:
        start = time.perf_counter()
        with store.transaction(device for device, _ in batch):
            for device, message in batch:
                if device not in known:
                    store.record_state(device, State(status="online", boot=message.boot), received=message.time)
                    known.add(device)
                store.record_telemetry(device, message, received=message.time)
        seconds += time.perf_counter() - start
        total += len(batch)
    return total / seconds


@contextmanager
def _new_store(kind: str) -> Iterator[tuple[SqlStore, Callable[[], int]]]:
    """An empty store, and what tells how many bytes of disk it takes."""
    if kind == SQLITE:
        with tempfile.TemporaryDirectory(prefix="store-scale-") as name:
            path = Path(name) / "monitor.sqlite"
            with closing(SqlStore(open_database(path))) as store:
                yield store, lambda: _file_bytes(store, path)
        return
    with postgres_server() as server:
        url = server.url()
        with closing(SqlStore(open_database(url))) as store:
            yield store, lambda: _relation_bytes(url)


def _file_bytes(store: SqlStore, path: Path) -> int:
    store._database.run("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.stat().st_size


def _relation_bytes(url: str) -> int:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM FULL")
        query = (
            "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0) FROM pg_class AS c"
            " WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
        )
        (size,) = connection.execute(query).fetchone()
    return int(size)


def _notes(rows: Sequence[Row]) -> str:
    parts = [
        f"Batches of {BATCH}; each is on disk before the next. The history is {row['history_messages']} messages of one "
        f"device, {INTERVAL_S:g} s apart."
        for row in rows[:1]
    ]
    parts.append("TimescaleDB was not there. One process writes; several were not measured here.")
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
