"""A store as files: earlier schemas, foreign files, backup and restore, Parquet."""

import datetime
import json
import shutil
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

import host.monitor.parquet
from device.contract.messages import Event, Reply, State, Telemetry
from device.contract.topics import DeviceId
from host.cli import main
from host.errors import MonitorError
from host.monitor.parquet import export_parquet
from host.monitor.retention import DAY_S, Retention
from host.monitor.rows import Gap
from host.monitor.sqlite_database import back_up, restore
from host.monitor.store import Store, open_store
from tests.support.stores import opened

SCHEMA_1 = (Path(__file__).parents[1] / "support" / "store_schema_1.sql").read_text()
CAMERA, OTHER = DeviceId("greenhouse", "cam-1"), DeviceId("greenhouse", "cam-2")


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A file of schema 1."""
    path = tmp_path / "earlier.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
    return path


def telemetry(n: int, *, boot: str = "b1", time: float | None = None, **values: float) -> Telemetry:
    return Telemetry(boot=boot, sequence=n, time=time or 1000.0 + n, values=values or {"drift": 0.5, "class/3": 2.0})


def test_a_store_of_schema_1_is_taken_over_whole(earlier, caplog):
    with opened(earlier) as store:
        assert "earlier.sqlite: taking over schema 1" in caplog.text
        row, other = store.device(CAMERA), store.device(OTHER)
        assert (row.received, row.duplicates, row.missing, row.unwatched) == (7, 1, 3, 0)
        assert (other.missing, other.unwatched) == (1, 39)
        assert (row.state.labels, row.status, row.last_seen) == (("healthy", "blight"), "online", 133.0 + 2)
        watched = [gap for gap in store.gaps(CAMERA) if gap.first == 6]
        assert watched == [Gap(boot="b1", first=6, last=8, missing=1, watched=True, opened=109.0, closed=None)]
        assert [event.event.data for event in store.events(CAMERA)] == [{"why": "test"}]
        assert store.quarantined_total() == 2
        assert store.quarantined(CAMERA)[0].payload == b"\xff\x00"
        assert store.telemetry(CAMERA, ("drift",), since=0, until=2 * 86400).resolution_s % 60 == 0
        hours = store.telemetry(CAMERA, ("latency/p50", "drift"), since=0, until=10 * 86400)
        assert hours.values["latency/p50"] == pytest.approx([0.01, 0.062])  # one message before the hour, five after
        assert store.class_mix(CAMERA, since=0, until=10 * 86400) == {"0": 18.0, "1": 6.0}
        for number, is_new in ((5, False), (6, True), (3, True), (6, False)):
            again = {
                "frames": 4.0,
                "latency/p50": 0.05,
                "latency/p99": 0.5,
                "class/0": 3.0,
                "class/1": 1.0,
                "drift": 0.5,
            }
            message = telemetry(number, time=3630.0, **again)
            assert store.record_telemetry(CAMERA, message, received=200.0) == is_new
        assert store.device(CAMERA).missing == 1
        assert not store.record_telemetry(OTHER, telemetry(42, boot="x", time=30.0, frames=2.0), received=200.0)
        assert store.record_telemetry(OTHER, telemetry(41, boot="x", time=30.0, frames=2.0), received=200.0)
        store.record_reply(CAMERA, Reply(id="c2", ok=True), received=200.0)  # answered already
        kept = store._database.read("SELECT command FROM reply ORDER BY id")
        assert [row["command"] for row in kept] == ["c", "c2"]
        identity = store.identity
    assert f"'identity','{identity}'" in SCHEMA_1
    with opened(earlier) as again:
        assert again.identity == identity
        assert again.device(CAMERA).missing == 1


def test_a_migration_that_fails_leaves_the_file_as_it_was(earlier, monkeypatch):
    before = dump(earlier)
    monkeypatch.setattr("host.monitor.sqlite_migration._rollups", lambda connection, width_s: [(1, 2)])
    with pytest.raises(MonitorError, match="cannot be used as a store"):
        open_store(earlier)
    assert dump(earlier) == before
    monkeypatch.undo()
    open_store(earlier).close()


def dump(path: Path) -> tuple[list[str], int]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump()), connection.execute("PRAGMA user_version").fetchone()[0]


def test_newer_and_foreign_files_are_refused(tmp_path):
    open_store(tmp_path / "newer").close()
    (tmp_path / "text").write_text("not a database, but long enough to be read as one" * 20)
    for name, sql in (("newer", "PRAGMA user_version = 7"), ("foreign", "CREATE TABLE mine (x)")):
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            connection.execute(sql)
    with closing(sqlite3.connect(tmp_path / "numbered")) as connection:
        connection.executescript("CREATE TABLE mine (x); PRAGMA user_version = 1")
    messages = {"newer": "schema 7 is newer", "foreign": "something else", "numbered": "something else"}
    for name, message in (messages | {"text": "cannot be used"}).items():
        with pytest.raises(MonitorError, match=message):
            open_store(tmp_path / name)
    with pytest.raises(MonitorError, match="cannot be opened"):
        open_store(tmp_path)
    with pytest.raises(MonitorError, match=r"store 'host/fleet': expected a file, or postgresql://"):
        open_store("mysql://me:secret@host/fleet")


def test_a_full_disk_commits_nothing_and_the_store_goes_on(tmp_path):
    with opened(tmp_path / "s.sqlite") as store:
        (size,) = store._database.run("PRAGMA page_count")[0]
        store._database.run(f"PRAGMA max_page_count = {size + 4}")
        with pytest.raises(MonitorError, match=r"full.*free disk space"):
            record_many(store, 200)
        assert store.devices() == []
        store._database.run("PRAGMA max_page_count = 100000")
        assert store.record_telemetry(CAMERA, telemetry(1), received=1.0)


def test_what_is_forgotten_leaves_the_file(tmp_path):
    path = tmp_path / "s.sqlite"
    with opened(path) as store:
        for part in range(5):
            record_many(store, 2000, boot=f"b{part}")
        store._database.run("PRAGMA wal_checkpoint(TRUNCATE)")
        before = path.stat().st_size
        assert store.forget(Retention(), now=100 * DAY_S).telemetry == 10_000
        store._database.run("PRAGMA wal_checkpoint(TRUNCATE)")
        assert path.stat().st_size < before / 5


def record_many(store: Store, messages: int, *, boot: str = "b1") -> None:
    values = {f"class/{k}": 1.0 for k in range(40)}
    with store.transaction([CAMERA]):
        for n in range(1, messages + 1):
            store.record_telemetry(CAMERA, telemetry(n, boot=boot, **values), received=1.0)


def test_a_backup_is_of_one_moment_and_restores_whole(tmp_path):
    path, copy = tmp_path / "s.sqlite", tmp_path / "backups" / "copy.sqlite"
    stop = threading.Event()
    with opened(path) as store:

        def write() -> None:
            for n in range(1, 100_000):
                with store.transaction([CAMERA, OTHER]):  # both or none
                    store.record_telemetry(CAMERA, telemetry(n), received=1.0)
                    store.record_telemetry(OTHER, telemetry(n), received=1.0)
                if stop.is_set():
                    return

        thread = threading.Thread(target=write)
        thread.start()
        try:
            while len(store.devices()) < 2:
                pass
            back_up(path, copy)
        finally:
            stop.set()
            thread.join()
        identity = store.identity
    restore(copy, tmp_path / "again.sqlite")
    with opened(tmp_path / "again.sqlite") as store:
        received = {row.received for row in store.devices()}
        assert (len(received), len(store.devices()), store.identity) == (1, 2, identity)
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_backup_of_an_earlier_schema_is_restored_and_taken_over(earlier, tmp_path):
    restore(earlier, tmp_path / "again.sqlite")
    with opened(tmp_path / "again.sqlite") as store:
        assert store.device(CAMERA).received == 7


def test_restoring_replaces_nothing_and_refuses_what_is_no_store(tmp_path):
    open_store(tmp_path / "s.sqlite").close()
    (tmp_path / "text").write_text("no database at all" * 100)
    sqlite3.connect(tmp_path / "empty").close()
    damaged = tmp_path / "damaged"
    with opened(damaged) as store, store.transaction():
        for n in range(1, 400):
            store.record_telemetry(CAMERA, telemetry(n), received=1.0)
    content = bytearray(damaged.read_bytes())
    content[3 * 4096 : -4096] = b"\x5a" * (len(content) - 4 * 4096)
    damaged.write_bytes(content)
    for backup, to, message in (
        ("text", "new", "cannot be copied"),
        ("empty", "new", "something else"),
        ("damaged", "new", "damaged"),
        ("none", "new", "there is no backup"),
        ("s.sqlite", "s.sqlite", "exists already"),
    ):
        with pytest.raises(MonitorError, match=message):
            restore(tmp_path / backup, tmp_path / to)
        assert not (tmp_path / "new").exists()
    with pytest.raises(MonitorError, match="there is no store"):
        back_up(tmp_path / "none", tmp_path / "new")


def fill(store) -> None:
    store.record_state(CAMERA, State(status="online", boot="b1", labels=("healthy",)), received=5.0)
    with store.transaction([CAMERA]):
        for n in range(1, 26):
            store.record_telemetry(CAMERA, telemetry(n), received=2000.25)
    store.record_telemetry(OTHER, telemetry(3, time=0.0), received=2001.0)
    event = Event(kind="drift", boot="b1", sequence=26, time=253402300799.9999999, data={"why": "\ud800"})
    store.record_event(CAMERA, event, received=2002.0)


def test_parquet_holds_what_the_store_holds(store, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(host.monitor.parquet, "CHUNK_ROWS", 10)
    fill(store)
    counts = export_parquet(store._database, tmp_path / "tables")
    assert counts == {"telemetry": 26, "events": 1, "devices": 2}
    assert parquet.ParquetFile(tmp_path / "tables" / "telemetry.parquet").num_row_groups == 3
    rows = parquet.read_table(tmp_path / "tables" / "telemetry.parquet").to_pylist()
    first = next(row for row in rows if row["device"] == "cam-1" and row["sequence"] == 1)
    assert (first["site"], first["boot"], first["drift"], first["latency/p50"]) == ("greenhouse", "b1", 0.5, None)
    assert first["time"] == datetime.datetime(1970, 1, 1, 0, 16, 41, tzinfo=datetime.UTC)
    assert (first["received"].microsecond, first["classes"]) == (250_000, [(3, 2.0)])
    (event,) = parquet.read_table(tmp_path / "tables" / "events.parquet").to_pylist()
    assert (event["kind"], json.loads(event["data"]), event["time"].year) == ("drift", {"why": "\ud800"}, 9999)
    devices = {row["device"]: row for row in parquet.read_table(tmp_path / "tables" / "devices.parquet").to_pylist()}
    assert (devices["cam-1"]["received"], devices["cam-2"]["unwatched"]) == (26, 2)
    assert json.loads(devices["cam-1"]["state"])["labels"] == ["healthy"]


def test_parquet_is_written_whole_or_not_at_all(store, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    fill(store)
    monkeypatch.setattr(host.monitor.parquet, "_DEVICES", "SELECT no_such_column FROM device")
    with pytest.raises(MonitorError, match="no_such_column"):
        export_parquet(store._database, tmp_path / "tables")
    assert not list(tmp_path.glob("tables*"))
    (tmp_path / "tables").mkdir()
    with pytest.raises(MonitorError, match="exists already"):
        export_parquet(store._database, tmp_path / "tables")


def test_the_verbs_of_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    with opened("monitor.sqlite") as store:
        fill(store)
    assert run(capsys, "export", "--parquet", "tables") == (0, "tables: 26 telemetry, 1 events, 2 devices\n", "")
    code, out, _ = run(capsys, "backup", "copy.sqlite")
    assert (code, out.startswith("copy.sqlite: 0.")) == (0, True)
    assert run(capsys, "restore", "copy.sqlite", "--store", "again.sqlite")[:2] == (
        0,
        "again.sqlite: as in copy.sqlite\n",
    )
    shutil.rmtree("tables")
    assert run(capsys, "export", "--parquet", "tables", "--store", "again.sqlite")[0] == 0
    for arguments, message in (
        (("export", "--parquet", "t", "--store", "none.sqlite"), "there is no store"),
        (("backup", "x", "--store", "postgresql://h/d"), "use pg_dump"),
        (("restore", "x", "--store", "postgresql://h/d"), "use pg_restore"),
        (("restore", "copy.sqlite"), "exists already"),
        (("--store", "other.sqlite", "backup", "x"), "--store: write the options of backup after it"),
        (("--keep-telemetry", "90"), "keep-telemetry: 90 days is longer than the 31 of keep-minutes"),
    ):
        code, _, err = run(capsys, *arguments)
        assert (code, message in err) == (16, True), err
    assert not Path("none.sqlite").exists()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["monitor", *arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_what_an_extra_brings_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with opened(tmp_path / "s.sqlite") as store, pytest.raises(MonitorError, match=r"install 'fieldvit\[parquet\]'"):
        export_parquet(store._database, tmp_path / "tables")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "host.monitor.postgres_database", raising=False)
    with pytest.raises(MonitorError, match=r"pip install 'fieldvit\[postgres\]'"):
        open_store("postgresql://host/fleet")
