"""The `fieldvit` command: one verb per step of the loop.

Verbs parse, call one function and print. Heavy imports happen inside the verb, so `--help` is quick.
"""

import io
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from device.contract.errors import DeviceError
from host.errors import HostError, RecipeError

app = typer.Typer(
    name="fieldvit",
    help="Train, compress, prove, ship and watch vision transformers on boards and phones.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, TOML.", show_default=False)]
BundleArgument = Annotated[Path, typer.Argument(help="A bundle, NAME-VERSION.fieldvit.", show_default=False)]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
BROKER_HELP = "auto (mosquitto if installed, else embedded), mosquitto, amqtt, or mqtt://HOST:PORT."
RUNS = Path("runs")
INTERRUPTED = 130
_UsageError: Any = typer.BadParameter.__base__  # Typer carries its own click and exports no public name for this class


@app.command(epilog="Example: fieldvit quickstart --keep-running")
def quickstart(
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data split and of training.")] = 0,
    runs: RunsOption = RUNS,
    device_python: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with only fieldvit[device]; 'make device-env' makes one."),
    ] = None,
    broker: Annotated[str, typer.Option(help=BROKER_HELP)] = "auto",
    short: Annotated[
        bool, typer.Option("--short", help="Train for a few epochs only: checks the plumbing, not the accuracy.")
    ] = False,
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Leave board and monitor up afterwards, until Ctrl-C.")
    ] = False,
) -> None:
    """Run the whole loop on real digits: train, compress, prove, ship, run, teach, survive bad updates, report."""
    from host.quickstart.run import QuickstartConfig, run_quickstart

    config = QuickstartConfig(
        seed=seed, runs=runs, device_python=device_python, broker=broker, short=short, keep_running=keep_running
    )
    run_quickstart(config)


@app.command(epilog="Example: fieldvit run my.toml")
def run(recipe: RecipeArgument, runs: RunsOption = RUNS) -> None:
    """Run all stages of a recipe; finished ones are not repeated."""
    _run_until(recipe, runs, "export")


@app.command(epilog="Example: fieldvit train my.toml")
def train(recipe: RecipeArgument, runs: RunsOption = RUNS) -> None:
    """Train the model of a recipe, and its teacher if it distils."""
    _run_until(recipe, runs, "train")


@app.command(epilog="Example: fieldvit quantize my.toml")
def quantize(recipe: RecipeArgument, runs: RunsOption = RUNS) -> None:
    """Convert to TFLite and quantize to int8 after training; refused when accuracy drops by more than the recipe allows."""
    _run_until(recipe, runs, "quantize")


@app.command(epilog="Example: fieldvit export my.toml")
def export(recipe: RecipeArgument, runs: RunsOption = RUNS) -> None:
    """Write and prove every artifact, and pack the bundle for the recipe's boards."""
    _run_until(recipe, runs, "export")


@app.command(epilog="Example: fieldvit verify runs/quickstart/export/quickstart-0.1.0.fieldvit")
def verify(bundle: BundleArgument, runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Compare every artifact of a bundle with the float reference on real images; exit code 11 if one fails."""
    from host.bundle_checks import CHECK_COLUMNS, verify_bundle

    report = verify_bundle(bundle, runs)
    if not as_json:
        print(f"{report.images} test images, against {report.reference}")
        print("cosine and difference: features of int8 and float32, logits of infer (int8) and coreml (float16)")
    _print_table(CHECK_COLUMNS, [check.row() for check in report.checks], asdict(report) if as_json else None)
    report.require_passed()


@app.command(epilog="Example: fieldvit bench runs/quickstart/export/quickstart-0.1.0.fieldvit")
def bench(
    bundle: BundleArgument,
    vs: Annotated[Path | None, typer.Option("--vs", help="Another bundle, measured in turn with the first.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the test images.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, latency, size and memory of a bundle's artifacts on this machine, alone or against another."""
    from host.bundle_bench import BENCH_COLUMNS, bench_bundles

    rows = bench_bundles([bundle, *([vs] if vs else [])], rounds=rounds)
    _print_table(
        BENCH_COLUMNS, [row.row() for row in rows], {"rows": [asdict(row) for row in rows]} if as_json else None
    )


@app.command(epilog="Example: fieldvit publish runs/quickstart/export/quickstart-0.1.0.fieldvit --channel stable")
def publish(
    bundle: BundleArgument,
    channel: Annotated[str, typer.Option(help="The channel that will point at the bundle.")] = "stable",
    repo: Annotated[Path, typer.Option(help="The update repository; made if it is not there.")] = Path("updates"),
    keys: Annotated[Path, typer.Option(help="Its signing keys; made with the repository. Keep them secret.")] = Path(
        "keys"
    ),
) -> None:
    """Sign a bundle into the update repository and point a channel at it."""
    from host.fleet.repository import publish_bundle

    manifest = publish_bundle(bundle, channel, directory=repo, keys=keys)
    print(f"{manifest.name} {manifest.version} (release {manifest.release}) is signed into {repo}, channel {channel}")


@app.command(
    epilog="Example: fieldvit flash runs/quickstart/export/quickstart-0.1.0.fieldvit --to dir:/media/sdcard --board raspberry-pi-5"
)
def flash(
    bundle: BundleArgument,
    to: Annotated[str, typer.Option("--to", help="dir:PATH, the board's data directory.", show_default=False)],
    board: Annotated[str, typer.Option(help="The board's profile; see 'fieldvit boards'.")] = "generic-x86-64",
    repo: Annotated[Path, typer.Option(help="The update repository that the bundle is published in.")] = Path(
        "updates"
    ),
    channel: Annotated[str, typer.Option(help="The channel the board follows.")] = "stable",
    site: Annotated[str, typer.Option(help="Site id.")] = "home",
    device: Annotated[str, typer.Option(help="Device id.")] = "board-1",
    broker: Annotated[str, typer.Option(help="mqtt://[USER@]HOST[:PORT]; without it the board keeps to itself.")] = "",
    frames: Annotated[
        str, typer.Option(help="Where the board finds its frames, relative to its data directory.")
    ] = "frames",
) -> None:
    """Put a published bundle, the trusted root and a configuration into a board's data directory."""
    from device.contract.topics import DeviceId
    from host.fleet.flash import BoardSettings, flash_directory

    root = parse_directory(to)
    address = parse_broker(broker) if broker else None
    settings = BoardSettings(id=DeviceId(site, device), board=board, channel=channel, broker=address, frames=frames)
    expires = flash_directory(bundle, root, repository=repo, settings=settings)
    print(f"{root} is ready for {board}, to be installed before {expires:%Y-%m-%d}; after that publish and flash again")
    print(f"start the board with: fieldvit-device run --root {root}")


@app.command(epilog="Example: fieldvit monitor --store monitor.sqlite --port 8080")
def monitor(
    store: Annotated[Path, typer.Option(help="SQLite file that keeps what boards report.")] = Path("monitor.sqlite"),
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
) -> None:
    """Ingest what boards report and serve the page that shows it; starts a broker if none is given."""
    from host.monitor.app import MonitorConfig, run_monitor

    is_url = "://" in broker
    config = MonitorConfig(
        store=store,
        broker=broker if is_url else None,
        broker_password_file=broker_password_file,
        broker_kind="auto" if is_url else broker,
        broker_hostname=broker_host,
        broker_port=broker_port,
        http_hostname=host,
        http_port=port,
        ready_file=ready_file,
    )
    run_monitor(
        config,
        on_ready=lambda ready: print(f"page {ready.page}, broker {ready.broker} ({ready.broker_kind})", flush=True),
    )


@app.command(epilog="Example: fieldvit boards")
def boards(as_json: JsonOption = False) -> None:
    """List the board profiles with what they may run and their budgets."""
    from device.contract.board import board_names, load_board
    from device.contract.records import to_table

    profiles = [load_board(name) for name in board_names()]
    columns = ("board", "formats", "precisions", "artifact MB", "latency ms", "memory MB", "description")
    rows = [
        (
            board.name,
            " ".join(board.support.formats),
            " ".join(board.support.precisions),
            f"{board.budget.artifact_bytes / 1e6:.0f}",
            f"{board.budget.latency_ms:.0f}",
            str(board.budget.peak_memory_mb),
            board.description,
        )
        for board in profiles
    ]
    _print_table(columns, rows, {"boards": [to_table(board) for board in profiles]} if as_json else None)


models_app = typer.Typer(help="List the models, or draw one.", epilog="Example: fieldvit models --json")
app.add_typer(models_app, name="models")


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List every model that a recipe can name, with its size; `models show NAME` draws one."""
    if context.invoked_subcommand:
        if as_json:
            raise RecipeError(
                f"--json belongs behind the verb: fieldvit models {context.invoked_subcommand} NAME --json"
            )
        return
    from host.model_list import COLUMNS, NARROW_COLUMNS, model_records, model_rows

    shown = NARROW_COLUMNS if _is_narrow() else len(COLUMNS)
    rows = [row[:shown] for row in model_rows()]
    _print_table(COLUMNS[:shown], rows, {"models": model_records()} if as_json else None)


@models_app.command("show", epilog="Example: fieldvit models show nextvit/s")
def show_model(
    name: Annotated[str, typer.Argument(help="FAMILY/VARIANT.", show_default=False)], as_json: JsonOption = False
) -> None:
    """Draw a model from image to logits: its stages with their shapes, parameters and MACs."""
    from host.model_list import show_lines, show_record

    if as_json:
        print(json.dumps(show_record(name), indent=1))
    else:
        print(*show_lines(name), sep="\n")


@app.command(epilog="Example: fieldvit doctor")
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: interpreter, packages, broker, disk, ports; each finding says what to do."""
    from host.doctor import diagnose

    findings = diagnose()
    _print_table(
        ("", "check", "finding"),
        [finding.row() for finding in findings],
        {"findings": [asdict(f) for f in findings]} if as_json else None,
    )
    if not all(finding.ok for finding in findings if finding.required):
        raise HostError("this machine is not ready; do what the lines marked 'fix' say")


def parse_directory(target: str) -> Path:
    """The path in `dir:PATH`; RecipeError for any other target."""
    kind, _, path = target.partition(":")
    if kind != "dir" or not path:
        raise RecipeError(f"--to {target!r}: this version flashes directories; write dir:PATH")
    return Path(path)


def parse_broker(url: str) -> Any:
    """What a board is told of the broker at `mqtt://[USER@]HOST[:PORT]`."""
    from host.fleet.flash import BrokerSettings
    from host.monitor.broker import parse_broker_url

    address = parse_broker_url(url)
    return BrokerSettings(hostname=address.hostname, port=address.port, username=address.username)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; our own errors become one line on stderr and their exit code."""
    from converters.errors import ConversionError

    arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a sign shows another, not a traceback
    try:
        status = app(args=arguments, prog_name="fieldvit", standalone_mode=False)
    except (HostError, DeviceError, ConversionError) as error:
        return _fail(str(error), error.exit_code)
    except typer.Exit as error:
        status = error.exit_code
    except _UsageError as error:
        return _fail(f"{error.format_message()} (see '{_command_path(error)} --help')", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}", 74)
    if status == INTERRUPTED:  # Typer turns Ctrl-C into this status without a word
        return _fail("interrupted; run the same command again, finished stages are kept", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _run_until(path: Path, runs: Path, last: str) -> None:
    from host.recipe import load_recipe
    from host.stages.order import run_recipe
    from host.terminal import StageLines

    directory = run_recipe(load_recipe(path), runs, until=last, report=StageLines())
    print(directory / last)


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], as_json: dict[str, Any] | None) -> None:
    if as_json is not None:
        print(json.dumps(as_json, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        is_last = index == len(columns) - 1
        table.add_column(column, no_wrap=not is_last, overflow="fold" if is_last else "ellipsis")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _is_narrow() -> bool:
    """Whether standard output is a terminal of fewer than 130 columns."""
    return sys.stdout.isatty() and shutil.get_terminal_size().columns < 130


def _command_path(error: Any) -> str:
    return error.ctx.command_path if error.ctx else "fieldvit"


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
