"""`fieldvit monitor`, and its verbs that work on its store: copies of it, and tables for others."""

from pathlib import Path
from typing import Annotated

import typer

from host.cli_rollout import ROLLOUTS
from host.errors import MonitorError
from host.monitor.retention import Retention

BROKER_HELP = "auto (mosquitto if installed, else embedded), mosquitto, amqtt, or mqtt://HOST:PORT."
KEPT = Retention()
STORE_HELP = "SQLite file that keeps what boards report, or postgresql://[USER@]HOST[:PORT]/DATABASE."
STORE = "monitor.sqlite"
StoreOption = Annotated[str, typer.Option("--store", help=STORE_HELP)]

monitor_app = typer.Typer(epilog="Example: fieldvit monitor --store monitor.sqlite --port 8080")


@monitor_app.callback(invoke_without_command=True)
def monitor(
    context: typer.Context,
    store: StoreOption = STORE,
    broker: Annotated[str, typer.Option(help=BROKER_HELP)] = "auto",
    broker_password_file: Annotated[
        Path | None, typer.Option(help="Its first line is the password for the broker given by URL.")
    ] = None,
    broker_host: Annotated[str, typer.Option(help="Address a broker started here listens on.")] = "127.0.0.1",
    broker_port: Annotated[int, typer.Option(help="Port of a broker started here; 0 takes a free one.")] = 1883,
    host: Annotated[str, typer.Option(help="Address the page listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.")] = 8080,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write addresses here, as JSON, once everything listens.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(help="Directory of a site of 'fieldvit fleet init': its broker, as its monitor.")
    ] = None,
    rollouts: Annotated[Path, typer.Option(help="Where rollouts are kept, which are carried on here.")] = ROLLOUTS,
    alerts: Annotated[
        Path | None, typer.Option(help="Rules for alerts, TOML, as host/monitor/alerts/rules.py shows; without, ours.")
    ] = None,
    keep_telemetry: Annotated[float, typer.Option(help="Days to keep telemetry as it came.")] = KEPT.telemetry_days,
    keep_minutes: Annotated[float, typer.Option(help="Days to keep what each minute gave.")] = KEPT.minutes_days,
    keep_hours: Annotated[float, typer.Option(help="Days to keep what each hour gave, and events.")] = KEPT.hours_days,
) -> None:
    """Ingest what boards report, carry rollouts on, and serve the page that shows it; starts a broker if none is given."""
    if context.invoked_subcommand:
        _require_no_options(context)
        return
    from host.monitor.app import MonitorConfig, run_monitor

    is_url = "://" in broker
    config = MonitorConfig(
        store=store,
        broker=broker if is_url else None,
        broker_password_file=broker_password_file,
        site=site,
        broker_kind="auto" if is_url else broker,
        broker_hostname=broker_host,
        broker_port=broker_port,
        http_hostname=host,
        http_port=port,
        ready_file=ready_file,
        rollouts=rollouts,
        alerts=alerts,
        retention=Retention(telemetry_days=keep_telemetry, minutes_days=keep_minutes, hours_days=keep_hours),
    )
    run_monitor(
        config,
        on_ready=lambda ready: print(f"page {ready.page}, broker {ready.broker} ({ready.broker_kind})", flush=True),
    )


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


def _require_no_options(context: typer.Context) -> None:
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
