"""The `fieldvit` command: one verb per step of the loop.

Verbs parse, call one function and print. Heavy imports happen inside the verb, so `--help` is quick.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from device.contract.errors import DeviceError
from device.contract.topics import DeviceId
from host.cli_monitor import BROKER_HELP, monitor_app
from host.cli_publish import KEYS, KeysOption, publish_app, read_passphrase
from host.cli_publish import REPO as UPDATES
from host.cli_rollout import rollout_app
from host.cli_simulate import EXAMPLE as SIMULATE_EXAMPLE
from host.cli_simulate import simulate
from host.errors import FleetError, HostError, RecipeError
from host.fleet.verbs import fleet_app
from host.table import print_table as _print_table
from host.table import tell_progress

if TYPE_CHECKING:
    from host.fleet.ssh import Remote

app = typer.Typer(
    name="fieldvit",
    help="Train, compress, prove, ship and watch vision transformers on boards and phones.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, TOML, or zoo:NAME.", show_default=False)]
BundleArgument = Annotated[Path, typer.Argument(help="A bundle, NAME-VERSION.fieldvit.", show_default=False)]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
RepoOption = Annotated[Path, typer.Option("--repo", help="The update repository; made if it is not there.")]
SshKeyOption = Annotated[Path | None, typer.Option(help="ssh: the private key; else what ssh itself chooses.")]
KnownHostsOption = Annotated[Path | None, typer.Option(help="ssh: file of host keys, instead of your own.")]
BoardPythonOption = Annotated[str, typer.Option(help="ssh: the board's Python, 3.11 or later.")]
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


@app.command(epilog="Example: fieldvit run my.toml --flash dir:board")
def run(
    recipe: RecipeArgument,
    runs: RunsOption = RUNS,
    to: Annotated[
        str, typer.Option("--flash", help="dir:PATH of a board: publish the bundle and flash it there too.")
    ] = "",
    board: Annotated[str, typer.Option(help="That board's profile; without it the recipe's first.")] = "",
    repo: RepoOption = UPDATES,
    keys: KeysOption = KEYS,
    channel: Annotated[str, typer.Option(help="The channel that will point at the bundle.")] = "stable",
) -> None:
    """Run all stages of a recipe; finished ones are not repeated. With --flash, all the way to a board."""
    from host.recipe import load_recipe

    root = parse_directory(to) if to else None
    bundle = _run_until(recipe, runs, "export")
    if root is None or bundle is None:
        return
    from host.fleet.flash import BoardSettings, flash_directory
    from host.fleet.repository import publish_bundle

    board = board or load_recipe(recipe).export.boards[0]
    publish_bundle(bundle, channel, directory=repo, keys=keys, passphrase=read_passphrase(None))
    settings = BoardSettings(id=DeviceId("home", "board-1"), board=board, channel=channel, broker=None, frames="frames")
    _tell_flashed(root, board, flash_directory(bundle, root, repository=repo, settings=settings))


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


@app.command(epilog="Example: fieldvit data my.toml")
def data(recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Show what a recipe's data holds: how many images of each class train, validate, wait for the field, and test."""
    from host.data.sources import load_splits
    from host.data.splits import ClassCounts, class_counts
    from host.recipe import load_recipe

    loaded = load_recipe(recipe)
    splits = load_splits(loaded.data, seed=loaded.seed)
    counts = class_counts(splits)
    record = {
        "description": splits.description,
        "skipped": splits.skipped,
        "classes": [row._asdict() for row in counts],
    }
    if not as_json:
        print(splits.description)
        for name in splits.skipped:
            print(f"skipped, it cannot be read: {name}")
    _print_table(ClassCounts._fields, [tuple(map(str, row)) for row in counts], record if as_json else None)


@app.command(epilog="Example: fieldvit verify runs/quickstart/export/quickstart-0.1.0.fieldvit --layers")
def verify(
    bundle: BundleArgument,
    runs: RunsOption = RUNS,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare every tensor; name the first that departs, and draw the errors.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where the drawing goes; without it, beside the bundle.")] = None,
    second_route: Annotated[
        bool,
        typer.Option(
            "--second-route", help="Convert again by ONNX and onnx2tf, and compare; needs 'make onnx2tf-env'."
        ),
    ] = False,
    runtimes: Annotated[
        bool,
        typer.Option("--runtimes", help="Run the TFLite files in tflite-runtime and tf.lite too ('make legacy-env')."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every artifact of a bundle with the float reference on real images; exit code 11 if one fails."""
    if out and not layers:
        raise RecipeError(f"--out {out} is where --layers draws; add --layers")
    _require_bundle(bundle)
    from host.bundle_checks import CHECK_COLUMNS, verify_bundle
    from host.cross_checks import CROSS_COLUMNS
    from host.layer_table import LAYER_COLUMNS, draw_layers, layer_record, layer_rows, layer_summary

    report = verify_bundle(bundle, runs, with_layers=layers, second_route=second_route, runtimes=runtimes)
    if not as_json:
        print(f"{report.images} test images, against {report.reference}")
        print("cosine and difference: features of the TFLite files, logits of infer and coreml")
    record = {key: value for key, value in asdict(report).items() if key != "layers"}
    drawing = draw_layers(report.layers, bundle, out or bundle.parent) if layers else None
    if drawing:
        record |= {"layers": layer_record(report.layers), "drawing": str(drawing)}
    _print_table(CHECK_COLUMNS, [check.row() for check in report.checks], record if as_json else None)
    if report.cross_checks and not as_json:
        _print_table(CROSS_COLUMNS, [check.row() for check in report.cross_checks], None)
    if drawing and not as_json:
        _print_table(LAYER_COLUMNS, layer_rows(report.layers), None)
        print(*layer_summary(report), f"errors along the depth: {drawing}", sep="\n")
    report.require_passed()


@app.command(
    epilog="Example: fieldvit bench mine-0.1.0.fieldvit --vs other.tflite --vs other.onnx --queries 1024 --out bench"
)
def bench(
    bundle: Annotated[
        Path,
        typer.Argument(help="A bundle, NAME-VERSION.fieldvit, or a single .tflite or .onnx file.", show_default=False),
    ],
    vs: Annotated[
        list[Path] | None, typer.Option("--vs", help="Another of these, measured in turn with the first; repeatable.")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Queries of each file; 256 if --seconds is not given either.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Go on for so long, all files together; with --queries, until both.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each runtime.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Write report.html and report.md into this directory.", show_default=False)
    ] = None,
    on: Annotated[
        str, typer.Option("--on", help="ssh:USER@HOST[:PORT][/PATH], a flashed board; else here.", show_default=False)
    ] = "",
    ssh_key: SshKeyOption = None,
    known_hosts: KnownHostsOption = None,
    python: BoardPythonOption = "python3",
    as_json: JsonOption = False,
) -> None:
    """Measure latency, size, memory, accuracy and delegation, query by query, alone or against others, here or on a board."""
    from host.bench.contestants import require_measurable

    paths = [bundle, *(vs or [])]
    for path in paths:
        require_measurable(path)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    from host.bench.measure import Extent
    from host.bench.result import COLUMNS
    from host.bench.run import bench_files
    from host.terminal import StageLines

    board = _remote("--on", on, ssh_key, known_hosts, python) if on else None
    options = {"--queries": queries, "--seconds": seconds, "--threads": threads, "--on": on or None}
    words = [*paths[:1], *(word for path in paths[1:] for word in ("--vs", path))]
    words += [word for name, value in options.items() if value is not None for word in (name, value)]
    result = bench_files(
        paths,
        Extent.of(queries, seconds),
        num_threads=threads,
        command=shlex.join(["fieldvit", "bench", *map(str, words)]),
        today=datetime.now(UTC).date(),
        report=StageLines(),
        board=board,
    )
    if out:
        from host.bench.report import write_reports

        write_reports(result, out)
    _print_table(COLUMNS, [row.cells(COLUMNS) for row in result.rows], result.record() if as_json else None)
    if not as_json:
        print(*result.notes(), sep="\n")


app.add_typer(publish_app, name="publish")


@app.command(
    epilog="Example: fieldvit flash runs/quickstart/export/quickstart-0.1.0.fieldvit --to dir:/media/sdcard --board raspberry-pi-5"
)
def flash(
    bundle: BundleArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="dir:PATH, a board's data directory, or ssh:USER@HOST[:PORT][/PATH].", show_default=False
        ),
    ],
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
    ssh_key: SshKeyOption = None,
    known_hosts: KnownHostsOption = None,
    python: BoardPythonOption = "python3",
    wheels: Annotated[Path | None, typer.Option(help="ssh: wheels for a board without an index.")] = None,
    pip_args: Annotated[str, typer.Option(help="ssh: further options of the board's pip.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Put a published bundle, the trusted root and a configuration onto a board.

    A directory gets the files. Over ssh the board gets the runtime too, takes the bundle, and says whether it confirmed it.
    """
    from host.fleet.flash import BoardSettings, flash_directory

    address = parse_broker(broker) if broker else None
    settings = BoardSettings(id=DeviceId(site, device), board=board, channel=channel, broker=address, frames=frames)
    if to.startswith("ssh:"):
        from host.fleet.flash_ssh import describe, flash_ssh

        remote = _remote("--to", to, ssh_key, known_hosts, python)
        arguments = shlex.split(pip_args)
        outcome = flash_ssh(bundle, remote, repository=repo, settings=settings, wheels=wheels, pip_arguments=arguments)
        table = {**asdict(outcome), "expires": outcome.expires.isoformat()}
        print(json.dumps(table, indent=1) if as_json else "\n".join(describe(outcome, remote)))
        return
    root = parse_directory(to)
    expires = flash_directory(bundle, root, repository=repo, settings=settings)
    _tell_flashed(root, board, expires)


app.add_typer(monitor_app, name="monitor")
app.command(epilog=SIMULATE_EXAMPLE)(simulate)


@app.command(epilog="Example: fieldvit command greenhouse/cam-1 set-sampling max_fps=5 --site sites/greenhouse")
def command(
    device: Annotated[
        str, typer.Argument(help="SITE/DEVICE; without SITE that of --site, or home.", show_default=False)
    ],
    verb: Annotated[
        str, typer.Argument(help="status, diagnostics, undo, …; a wrong one lists all.", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="NAME=VALUE, as the verb takes them; text that looks like a number is quoted: 'label=\"8\"'.",
            show_default=False,
        ),
    ] = None,
    broker: Annotated[str, typer.Option(help="mqtt[s]://[USER@]HOST[:PORT].")] = "mqtt://127.0.0.1:1883",
    broker_password_file: Annotated[
        Path | None, typer.Option(help="Its first line is the password for that broker.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(help="Directory of a site of 'fieldvit fleet init': its broker, as its operator.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait; the command expires then.")] = 30,
    image: Annotated[Path | None, typer.Option(help="Where a snapshot is written.")] = None,
) -> None:
    """Send one command to one board and print its answer, as JSON."""
    from host.fleet.commands import Commander, parse_arguments, take_image
    from host.fleet.site import hold_identity
    from host.monitor.broker import parse_broker_url, site_broker

    values = parse_arguments(arguments or [])
    address = site_broker(site, "operator") if site else parse_broker_url(broker, password_file=broker_password_file)
    receiver = _receiver(device, site)
    login = {"username": address.username, "password": address.password, "tls": address.tls}
    alone = hold_identity(site, "operator") if site else contextlib.nullcontext()
    with alone, Commander(address.hostname, address.port, **login) as commander:
        reply = commander.send(receiver, verb, values, timeout_s=timeout)
    if not reply.ok:
        advice = "; text that looks like a number is quoted: 'NAME=\"8\"'" if "expected str" in str(reply.error) else ""
        raise FleetError(f"{receiver} refused {verb}: {reply.error}{advice}")
    print(json.dumps(take_image(reply.result, image), indent=1))


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


app.add_typer(fleet_app, name="fleet")
app.add_typer(rollout_app, name="rollout")

models_app = typer.Typer(help="List the models, or draw one.", epilog="Example: fieldvit models --json")
app.add_typer(models_app, name="models")


@models_app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    as_json: JsonOption = False,
    board: Annotated[str, typer.Option(help="Say which fit this board; see 'fieldvit boards'.")] = "",
) -> None:
    """List every model that a recipe can name, with its size; `models show NAME` draws one."""
    if context.invoked_subcommand:
        if as_json:
            raise RecipeError(
                f"--json belongs behind the verb: fieldvit models {context.invoked_subcommand} NAME --json"
            )
        if board:
            raise RecipeError(f"--board belongs to the list: fieldvit models --board {board}")
        return
    from device.contract.board import load_board

    profile = load_board(board) if board else None
    from host.model_list import NARROW_COLUMNS, board_note, model_columns, model_records, model_rows

    columns = model_columns(profile)
    shown = NARROW_COLUMNS if _is_narrow() else len(columns)
    if profile and not as_json:
        print(board_note(profile))
    rows = [row[:shown] for row in model_rows(profile)]
    _print_table(columns[:shown], rows, {"models": model_records(profile)} if as_json else None)
    if shown < len(columns) and not as_json:
        print(f"a wider terminal, or --json, also shows {', '.join(columns[shown:])}")


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


@models_app.command("zoo", epilog="Example: fieldvit models zoo")
def list_zoo(as_json: JsonOption = False) -> None:
    """List the trained checkpoints that ship, with their data, its terms, and their accuracy; `run zoo:NAME` takes one."""
    from device.contract.records import to_table
    from host.zoo.cards import list_cards

    cards = list_cards()
    columns = ("checkpoint", "model", "classes", "accuracy", "test images", "data")
    rows = [
        (
            card.name,
            f"{card.family}/{card.variant}",
            str(len(card.labels)),
            f"{card.test_accuracy:.2%}",
            str(card.test_images),
            card.description,
        )
        for card in cards
    ]
    _print_table(columns, rows, {"checkpoints": [to_table(card) for card in cards]} if as_json else None)


@app.command(epilog="Example: fieldvit doctor")
def doctor(
    sites: Annotated[Path, typer.Option(help="Where sites are kept, if there are any.")] = Path("sites"),
    as_json: JsonOption = False,
) -> None:
    """Check this machine: interpreter, packages, broker, disk, ports, sites; each finding says what to do."""
    from host.doctor import diagnose

    findings = diagnose(sites)
    _print_table(
        ("", "check", "finding"),
        [finding.row() for finding in findings],
        {"findings": [asdict(f) for f in findings]} if as_json else None,
    )
    if not all(finding.ok for finding in findings if finding.required):
        raise HostError("this machine is not ready; do what the lines marked 'fix' say")


def _receiver(device: str, site: Path | None) -> DeviceId:
    """The board meant by `SITE/DEVICE`, or by `DEVICE` alone: at the site that was named, else at `home`."""
    from host.fleet.site import Site

    own = Site(site).name if site else ""
    receiver = DeviceId(*device.split("/", 1)) if "/" in device else DeviceId(own or "home", device)
    if own and receiver.site != own:
        raise FleetError(
            f"{receiver}: {site} is the site {own!r}; write {own}/{receiver.device}, or name another --site"
        )
    return receiver


def parse_directory(target: str) -> Path:
    """The path in `dir:PATH`; RecipeError for any other target."""
    kind, _, path = target.partition(":")
    if kind != "dir" or not path:
        raise RecipeError(f"--to {target!r}: write dir:PATH or ssh:USER@HOST[:PORT][/PATH]")
    return Path(path)


def parse_broker(url: str) -> Any:
    """What a board is told of the broker at `mqtt://[USER@]HOST[:PORT]`."""
    from host.fleet.flash import BrokerSettings
    from host.monitor.broker import parse_broker_url

    address = parse_broker_url(url)
    if address.tls is not None:
        raise RecipeError(
            f"--broker {url}: a board joins such a broker with a certificate of its own: fieldvit fleet token"
        )
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


def _remote(option: str, address: str, key: Path | None, known_hosts: Path | None, python: str) -> "Remote":
    from host.fleet.ssh import Remote, Target

    target = Target.parse(address, option=option)
    return Remote(target=target, key=key, known_hosts=known_hosts, python=python, tell=tell_progress)


def _tell_flashed(root: Path, board: str, expires: datetime) -> None:
    print(
        f"{root} is ready for {board}, to be installed before {expires:%Y-%m-%d}; "
        "after that 'fieldvit publish expire --renew' and flash again"
    )
    print(f"start the board with: fieldvit-device run --root {root}")


def _run_until(path: Path, runs: Path, last: str) -> Path | None:
    """Run a recipe's stages; returns the bundle, if there is one, and if this process is the one to go on with it."""
    from host.recipe import load_recipe
    from host.stages.order import run_recipe
    from host.terminal import StageLines

    if int(os.environ.get("RANK", 0)):  # one of several processes that torchrun started: the first one speaks for all
        run_recipe(load_recipe(path), runs, until=last, report=lambda *progress: None)
        return None
    directory = run_recipe(load_recipe(path), runs, until=last, report=StageLines())
    print(directory / last)
    return next((directory / last).glob("*.fieldvit"), None)


def _require_bundle(*bundles: Path) -> None:
    """Tell of a wrong path at once, before anything heavy is imported."""
    from device.contract.bundle import read_manifest

    for bundle in bundles:
        read_manifest(bundle)


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
