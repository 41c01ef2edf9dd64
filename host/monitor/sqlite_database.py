"""The SQLite file of a store: how it is opened, locked, backed up and restored.

WAL lets the page read while ingest writes. `synchronous=FULL`, because a message is acknowledged to the broker once it
is committed: a power cut must not take back what was acknowledged.
"""

import logging
import sqlite3
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from host.errors import MonitorError
from host.monitor.database import Row
from host.monitor.schema import SCHEMA_VERSION, Dialect, statements
from host.monitor.sqlite_migration import migrate

logger = logging.getLogger(__name__)

DIALECT = Dialect(counter="INTEGER", blob="BLOB", clustered=" WITHOUT ROWID", unique="UNIQUE")
TIDIED_PAGES = 2000  # given back at once; a commit that frees more would hold up ingest
COPIED_PAGES = 1000  # of a backup between two looks at the lock


class SqliteDatabase:
    """One file; a process that writes has it alone until it commits, so `lock` has nothing to do."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise MonitorError(f"{path}: cannot be opened ({error}); choose a folder you may write") from error
        try:
            self.identity = _prepare(self._writer, path)
        except BaseException:
            self._writer.close()
            raise
        self._path = path
        self._reader = _connect(path)
        self._reader.execute("PRAGMA query_only = 1")
        self._write_lock, self._read_lock = threading.RLock(), threading.Lock()
        self._failure: sqlite3.Error | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._write_lock:
            self._failure = None
            self.run("BEGIN IMMEDIATE")
            try:
                yield
                if self._failure is not None:
                    raise self._error(self._failure)
                self.run("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # the first error says it; a lost file rolls back at its next opening
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                raise

    def lock(self, names: Iterable[str]) -> None:
        """Nothing: BEGIN IMMEDIATE has locked the file."""

    def run(self, sql: str, *values: Any) -> list[Row]:
        try:
            return self._writer.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            self._failure = error
            raise self._error(error) from error

    def run_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        try:
            self._writer.executemany(sql, rows)
        except sqlite3.Error as error:
            self._failure = error
            raise self._error(error) from error

    def read(self, sql: str, *values: Any) -> list[Row]:
        with self._read_lock:
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise MonitorError(f"{self.name}: cannot be read ({error}); is the disk still there?") from error

    def stream(self, sql: str, *values: Any, rows: int) -> Generator[list[Row]]:
        try:
            with closing(_connect(self._path)) as connection:
                cursor = connection.execute(sql, values)
                while found := cursor.fetchmany(rows):
                    yield found
        except sqlite3.Error as error:
            raise MonitorError(f"{self.name}: cannot be read ({error}); is the disk still there?") from error

    def tidy(self) -> None:
        with self._write_lock:
            try:
                self._writer.executescript(
                    f"PRAGMA incremental_vacuum({TIDIED_PAGES})"
                )  # execute() would free one page
            except sqlite3.Error as error:
                raise self._error(error) from error

    def close(self) -> None:
        with self._write_lock:
            self._writer.close()
        with self._read_lock:
            self._reader.close()

    def _error(self, error: sqlite3.Error) -> MonitorError:
        return MonitorError(f"{self.name}: cannot be written ({error}); free disk space there")


def back_up(path: Path, to: Path) -> None:
    """Copy the store at `path`, while others write to it, to a new file; whole or not at all.

    Raises:
        MonitorError: there is no store, `to` exists, or it cannot be written.
    """
    if not path.is_file():
        raise MonitorError(f"{path}: there is no store; name its file with --store")
    _copy(path, to)


def restore(backup: Path, path: Path) -> None:
    """Make a store at `path`, where none may be, from a backup; of an earlier version, too.

    Raises:
        MonitorError: the backup is none or damaged, or there is a store at `path` already.
    """
    if not backup.is_file():
        raise MonitorError(f"{backup}: there is no backup")
    _copy(backup, path)


def _copy(source: Path, to: Path) -> None:
    taken = [path for path in (to, to.with_name(to.name + "-wal")) if path.exists()]
    if taken:
        raise MonitorError(f"{taken[0]}: exists already; stop what uses it and move it away, or choose another file")
    partial = to.with_name(to.name + ".partial")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with closing(_connect(source)) as original, closing(_connect(partial)) as copy:
            original.execute("PRAGMA query_only = 1")
            _require_store(original, source)
            original.backup(copy, pages=COPIED_PAGES)
            (verdict,) = copy.execute("PRAGMA quick_check").fetchone()
            if verdict != "ok":
                raise MonitorError(f"{source}: is damaged ({verdict}); take another backup")
        partial.replace(to)
    except (OSError, sqlite3.Error) as error:
        raise MonitorError(f"{source}: cannot be copied to {to} ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    """Open a connection that any thread may use in turn, in autocommit mode."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    connection.row_factory = sqlite3.Row
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> str:
    """Create the tables of a new file, take over those of an earlier version, and return the store's identity."""
    try:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # heeded by new files only
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            _create_or_migrate(connection, path)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        row = connection.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
    except sqlite3.Error as error:
        raise MonitorError(f"{path}: cannot be used as a store ({error}); choose another file") from error
    return str(row["value"])


def _create_or_migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if version or not is_empty:
        _require_store(connection, path)
    if version:
        logger.warning("%s: taking over schema %d; with millions of messages this takes minutes", path, version)
        migrate(connection, statements(DIALECT))
    else:
        for statement in statements(DIALECT):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('identity', ?)", (uuid.uuid4().hex,))
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _require_store(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise MonitorError(
            f"{path}: store schema {version} is newer than {SCHEMA_VERSION}, the newest that this version reads; "
            "upgrade fieldvit or choose another file"
        )
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version < 1 or not {"meta", "device", "message"} <= names:
        raise MonitorError(f"{path}: is a database of something else; choose another file")
