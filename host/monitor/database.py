"""What the store asks of a database. SQLite and PostgreSQL answer it; everything above is written once.

Statements are written in the SQL that both speak, with `?` for values. A library between them (SQLAlchemy Core was looked
at) would not make it less: the statements that differ are the tables' four words in `schema.py`, locks, and how each is
opened and backed up, which no such library does, and a batch of 200 messages is a dozen statements whatever writes them.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Row = Mapping[str, Any]


class Database(Protocol):
    """Safe to use from several threads. Every call raises MonitorError where the database cannot be used.

    One connection writes and one reads, so that the page never waits for a commit.
    """

    name: str  # for messages: a path, or a URL without secrets
    identity: str  # stays with the stored data

    def transaction(self) -> AbstractContextManager[None]:
        """Until its end `lock`, `run` and `run_many` are of one transaction, of the thread that began it.

        Committed, on disk, at the end; after an error of the database never, even if it was caught inside.
        """

    def lock(self, names: Iterable[str]) -> None:
        """Keep others, in whatever process, from what is called so, until the end of the transaction.

        Names locked in one call never wait for each other in a ring; those of several calls may, and are refused then.
        """

    def run(self, sql: str, *values: Any) -> list[Row]:
        """Run a statement of the transaction; returns its rows, if it gives any."""

    def run_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement that gives no rows for each of `rows`."""

    def read(self, sql: str, *values: Any) -> list[Row]:
        """The rows of a query, as they were last committed."""

    def stream(self, sql: str, *values: Any, rows: int) -> Generator[list[Row]]:
        """The rows of a long query, so many at a time, as of its beginning, on a connection of its own."""

    def tidy(self) -> None:
        """Give some of the space of deleted rows back to the system, where that can be done in passing."""

    def close(self) -> None: ...
