"""The verbs of `fieldvit monitor` that work on its store: copies of it, and tables for others."""

from pathlib import Path
from typing import Annotated

import typer

from host.errors import MonitorError

STORE_HELP = "SQLite file that keeps what boards report, or postgresql://[USER@]HOST[:PORT]/DATABASE."
STORE = "monitor.sqlite"
StoreOption = Annotated[str, typer.Option("--store", help=STORE_HELP)]

monitor_app = typer.Typer(epilog="Example: fieldvit monitor --store monitor.sqlite --port 8080")


@monitor_app.command(epilog="Example: fieldvit monitor export --parquet tables")
def export(
    parquet: Annotated[Path, typer.Option(help="The directory to make, for one Parquet file of each kind.")],
    store: StoreOption = STORE,
) -> None:
    """Write telemetry, events and devices as Parquet files; the monitor may run meanwhile."""
    from contextlib import closing

    from host.monitor.parquet import export_parquet
    from host.monitor.store import is_url, open_database

    if not is_url(store):
        _require(Path(store))
    with closing(open_database(store)) as database:
        rows = export_parquet(database, parquet)
    print(f"{parquet}: {', '.join(f'{count} {name}' for name, count in rows.items())}")


@monitor_app.command(epilog="Example: fieldvit monitor backup monitor-monday.sqlite")
def backup(
    to: Annotated[Path, typer.Argument(help="The file to make.", show_default=False)], store: StoreOption = STORE
) -> None:
    """Copy a SQLite store, complete at one moment; the monitor may run meanwhile."""
    from host.monitor.sqlite_database import back_up

    _require_file(store, "pg_dump --format=custom")
    back_up(Path(store), to)
    print(f"{to}: {to.stat().st_size / 1e6:.1f} MB")


@monitor_app.command(epilog="Example: fieldvit monitor restore monitor-monday.sqlite --store monitor.sqlite")
def restore(
    backup: Annotated[Path, typer.Argument(help="A file that 'backup' made.", show_default=False)],
    store: StoreOption = STORE,
) -> None:
    """Make a SQLite store from a backup; one that is there is not replaced."""
    from host.monitor.sqlite_database import restore as restore_store

    _require_file(store, "pg_restore")
    restore_store(backup, Path(store))
    print(f"{store}: as in {backup}")


def require_no_options(context: typer.Context) -> None:
    """Refuse options of `monitor` itself before one of its verbs, which would not heed them."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            verb = context.invoked_subcommand
            raise MonitorError(
                f"--{name.replace('_', '-')}: write the options of {verb} after it: fieldvit monitor {verb} …"
            )


def _require(path: Path) -> None:
    if not path.is_file():
        raise MonitorError(f"{path}: there is no store; name it with --store")


def _require_file(store: str, program: str) -> None:
    from host.monitor.store import is_url

    if is_url(store):
        raise MonitorError(f"--store: a PostgreSQL database is copied by its own programs; use {program}")
