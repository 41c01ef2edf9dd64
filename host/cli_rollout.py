"""`fieldvit rollout …`: begin one, see how it goes, stop it, take it back. The engine runs in `fieldvit monitor`."""

import getpass
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from host.table import print_table

rollout_app = typer.Typer(
    help="Bring a release to a few boards, then to more; take it back from all where it does harm.",
    no_args_is_help=True,
)

ROLLOUTS = Path("rollouts")
IdArgument = Annotated[str, typer.Argument(help="The rollout's name, as 'list' shows it.", show_default=False)]
RootOption = Annotated[Path, typer.Option("--rollouts", help="Where rollouts are kept; the monitor's own.")]
WhyOption = Annotated[str, typer.Option("--why", help="For the log.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]


@rollout_app.command("start", epilog="Example: fieldvit rollout start leaves-1.4.0.fieldvit --channel canary")
def start(
    bundle: Annotated[Path, typer.Argument(help="A bundle, NAME-VERSION.fieldvit.", show_default=False)],
    channel: Annotated[str, typer.Option(help="Which offers it, and which these boards do not follow by themselves.")],
    stages: Annotated[str, typer.Option(help="Numbers of boards, then percentages of all.")] = "1,10%,50%,100%",
    canary: Annotated[list[str] | None, typer.Option(help="SITE/DEVICE that comes first; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Pattern of SITE/DEVICE, as in 'greenhouse/*'.")] = None,
    name: Annotated[str, typer.Option("--id", help="The rollout's name; without it, of bundle and date.")] = "",
    max_failed: Annotated[float, typer.Option(help="Share of the boards told that may fail.")] = 0.02,
    min_done: Annotated[float, typer.Option(help="Share of a stage that must do well before the next.")] = 0.9,
    soak: Annotated[float, typer.Option(help="Seconds that a board is watched after it confirmed.")] = 600,
    patience: Annotated[float, typer.Option(help="Seconds that a stage waits for boards that are away.")] = 3600,
    max_latency: Annotated[float, typer.Option(help="Times the latency before.")] = 1.5,
    max_errors: Annotated[float, typer.Option(help="Share of frames that may fail.")] = 0.02,
    max_drift: Annotated[float, typer.Option(help="Of the features, in standard deviations.")] = 1.0,
    accept_loss: Annotated[bool, typer.Option(help="Also where a board forgets what it was taught.")] = False,
    rollouts: RootOption = ROLLOUTS,
) -> None:
    """Begin to bring a published bundle to boards, stage by stage."""
    from device.contract.bundle import read_manifest
    from host.errors import FleetError
    from host.monitor.rollout.journal import Journal
    from host.monitor.rollout.plan import Limits, Plan, parse_stages

    if not bundle.is_file():
        raise FleetError(f"{bundle}: no such bundle; 'fieldvit export' makes one")
    manifest, now = read_manifest(bundle), time.time()
    plan = Plan(
        id=name or _name_of(manifest.name, manifest.release, now),
        channel=channel,
        name=manifest.name,
        version=manifest.version,
        release=manifest.release,
        created=now,
        stages=parse_stages(stages),
        canaries=tuple(canary or ()),
        only=tuple(only or ()),
        limits=Limits(
            max_failed=max_failed,
            min_done=min_done,
            soak_s=soak,
            patience_s=patience,
            max_latency_ratio=max_latency,
            max_error_share=max_errors,
            max_drift=max_drift,
        ),
        accept_loss=accept_loss,
        by=getpass.getuser(),
    )
    Journal.create(rollouts, plan)
    print(f"{plan.id}: begun, {plan.name} {plan.version} by way of {', '.join(map(str, plan.stages))}")
    print(f"the monitor carries it on; 'fieldvit rollout show {plan.id}' tells how it goes")


@rollout_app.command("list", epilog="Example: fieldvit rollout list")
def list_all(rollouts: RootOption = ROLLOUTS, as_json: JsonOption = False) -> None:
    """All rollouts, the newest first."""
    from host.monitor.rollout.engine import open_journals

    rows = [_summary(journal) for journal in reversed(open_journals(rollouts))]
    columns = ("rollout", "release", "status", "told", "done", "failed", "stage")
    lines = [tuple(str(row[column]) for column in columns) for row in rows]
    print_table(columns, lines, {"rollouts": rows} if as_json else None)


@rollout_app.command("show", epilog="Example: fieldvit rollout show leaves-14-20261129-120000")
def show(name: IdArgument, rollouts: RootOption = ROLLOUTS, as_json: JsonOption = False) -> None:
    """How one goes, board by board, and what happened when."""
    from device.contract.records import to_table
    from host.monitor.rollout.engine import words
    from host.monitor.rollout.journal import Journal

    journal = Journal(rollouts / name)
    entries = journal.entries()
    table = _summary(journal) | {"entries": [to_table(entry) for entry in entries]}
    if as_json:
        print(json.dumps(table, indent=1))
        return
    print(f"{table['rollout']}: {table['release']}, {table['status']}, {table['stage']}")
    if table["reason"]:
        print(f"because: {table['reason']}")
    for entry in entries:
        print(f"{datetime.fromtimestamp(entry.time, UTC):%Y-%m-%dT%H:%M:%SZ} {words(entry)}")


@rollout_app.command("pause", epilog="Example: fieldvit rollout pause leaves-14-20261129-120000 --why 'harvest'")
def pause(name: IdArgument, why: WhyOption = "", rollouts: RootOption = ROLLOUTS) -> None:
    """Tell no more boards; those that were told go on."""
    _say(rollouts, name, "paused", why, allowed=("running",))


@rollout_app.command("resume", epilog="Example: fieldvit rollout resume leaves-14-20261129-120000")
def resume(name: IdArgument, why: WhyOption = "", rollouts: RootOption = ROLLOUTS) -> None:
    """Go on with one that was paused."""
    _say(rollouts, name, "resumed", why, allowed=("paused",))


@rollout_app.command("abort", epilog="Example: fieldvit rollout abort leaves-14-20261129-120000 --why 'wrong labels'")
def abort(name: IdArgument, why: WhyOption = "", rollouts: RootOption = ROLLOUTS) -> None:
    """Take it back from every board that has it."""
    _say(rollouts, name, "aborted", why, allowed=("running", "paused", "finished"))


def _name_of(model: str, release: int, now: float) -> str:
    short = re.sub(r"[^A-Za-z0-9_-]", "-", model)[:32]
    return f"{short}-{release}-{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}"


def _say(root: Path, name: str, kind: str, why: str, *, allowed: tuple[str, ...]) -> None:
    from host.errors import FleetError
    from host.monitor.rollout.journal import Entry, Journal

    journal = Journal(root / name)
    status = journal.progress.status
    if status not in allowed:
        raise FleetError(f"rollout {name}: is {status}, so it cannot be {kind}")
    journal.append(Entry(time=time.time(), kind=kind, reason=why, by=getpass.getuser()))
    print(f"{name}: {kind}")


def _summary(journal: Any) -> dict[str, Any]:
    plan, progress = journal.plan, journal.progress
    return {
        "rollout": plan.id,
        "release": f"{plan.name} {plan.version} ({plan.release})",
        "status": progress.status,
        "stage": f"{progress.stage + 1} of {len(plan.stages)}: {plan.stages[progress.stage]}",
        "told": len(progress.boards),
        "done": progress.count("done"),
        "failed": progress.count("failed"),
        "reverted": progress.count("reverted"),
        "reason": progress.reason,
    }
