"""Both stores, empty, for tests that every store must pass."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from host.monitor.store import Store, open_store
from tests.support.postgres import PostgresServer, forgetful_server

KINDS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server for all tests of a process; it need not survive a power cut."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with forgetful_server() as server:
        yield server


@pytest.fixture(params=KINDS)
def store_name(request, tmp_path: Path) -> str:
    """What `open_store` takes, of either kind."""
    if request.param == "sqlite":
        return str(tmp_path / "monitor.sqlite")
    return str(request.getfixturevalue("postgres").url())


@pytest.fixture
def store(store_name) -> Iterator[Store]:
    with opened(store_name) as store:
        yield store


@contextmanager
def opened(name: str) -> Iterator[Store]:
    """The store of that name until the block ends."""
    with closing(open_store(name)) as store:
        yield store
