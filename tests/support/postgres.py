"""A PostgreSQL server of the tests' own, on a socket in a temporary directory; every store there gets a schema of its own."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.patience import PATIENCE

USER = "fieldvit"
START_S = 30
MEMORY_BYTES = 2 << 30


@dataclass
class PostgresServer:
    """One cluster; `url` names a schema of it that nothing has used."""

    programs: Path
    directory: Path
    options: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self) -> str:
        """A store's URL, with nothing there yet."""
        import psycopg

        schema = f"store_{next(self._numbers)}"
        with psycopg.connect(self.base, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
        return f"{self.base}&options={quote(f'-csearch_path={schema}')}"

    @property
    def base(self) -> str:
        return f"postgresql://{USER}@/postgres?host={quote(str(self.directory), safe='')}"

    def start(self) -> None:
        self._control("start", "-w", "-t", f"{START_S * PATIENCE:.0f}", "-l", str(self.directory / "log"))

    def stop(self, mode: str = "immediate") -> None:
        self._control("stop", "-m", mode, "-w")

    def initialize(self) -> None:
        self._run("initdb", "-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale", "-N")

    @property
    def _data(self) -> str:
        return str(self.directory / "data")

    def _control(self, verb: str, *arguments: str) -> None:
        options = ["-o", f"-k {self.directory} -c listen_addresses='' {self.options}"] if verb == "start" else []
        self._run("pg_ctl", verb, "-D", self._data, *arguments, *options)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.programs / program, *arguments],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be kept open by the server
            stderr=subprocess.DEVNULL,
            timeout=2 * START_S * PATIENCE,
            check=False,
            **_unprivileged(),
        )
        if done.returncode:
            log = self.directory / "log"
            said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{program} {arguments[0]} ended with {done.returncode}: {said}")


@contextmanager
def forgetful_server() -> Iterator[PostgresServer]:
    """A server for tests, in memory where there is room: thousands of small files are slow to delete from a disk."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_BYTES
    with postgres_server(options="-c fsync=off", folder=memory if has_room else None) as server:
        yield server


@contextmanager
def postgres_server(*, options: str = "", folder: Path | None = None) -> Iterator[PostgresServer]:
    """Run a server until the block ends; skips the test where PostgreSQL is not installed."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with tempfile.TemporaryDirectory(
        prefix="fieldvit-pg-", dir=folder
    ) as name:  # short: a socket's path has 107 characters
        directory = Path(name)
        owner = _unprivileged()
        if owner:
            os.chown(directory, owner["user"], owner["group"])
        server = PostgresServer(programs, directory, options)
        server.initialize()
        server.start()
        try:
            yield server
        finally:
            server.stop()


def find_postgres() -> Path | None:
    """The directory of the server's programs, also where Debian puts them outside PATH; the newest."""
    found = shutil.which("initdb")
    directories = [Path(found).resolve().parent] if found else []
    directories += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    complete = [d for d in directories if all((d / name).exists() for name in ("initdb", "pg_ctl", "postgres"))]
    return complete[-1] if complete else None


def _unprivileged() -> dict[str, int]:
    """Whom a server is started as: root may not be it."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid}
