"""`fieldvit simulate`: a fleet of simulated boards."""

import json
from pathlib import Path
from typing import Annotated

import typer

from host.table import tell_progress

EXAMPLE = "Example: fieldvit simulate --devices 500 --broker 127.0.0.1:1883 --faults loss=0.02 --faults drift=0.1@60"
FAULTS_HELP = "loss, drift, clock-skew, reboot-storm or spool-overflow=RATE[@SECONDS], bad-model=RATE:RELEASE:EFFECT."


def simulate(
    devices: Annotated[int, typer.Option(help="How many boards.", show_default=False)],
    broker: Annotated[
        str, typer.Option(help="HOST:PORT or a URL; else what is started here: auto, mosquitto or amqtt.")
    ] = "auto",
    broker_password_file: Annotated[
        Path | None, typer.Option(help="Its first line is the password for the broker given by URL.")
    ] = None,
    broker_host: Annotated[str, typer.Option(help="Address a broker started here listens on.")] = "127.0.0.1",
    broker_port: Annotated[int, typer.Option(help="Port of a broker started here; 0 takes a free one.")] = 1883,
    site: Annotated[str, typer.Option(help="Site id of the boards.")] = "simulated",
    board: Annotated[str, typer.Option(help="The boards' profile; see 'fieldvit boards'.")] = "generic-x86-64",
    rate: Annotated[float, typer.Option(help="Seconds between two telemetry messages of a board.")] = 10.0,
    duration: Annotated[float | None, typer.Option(help="Seconds; without it, until Ctrl-C.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what the boards measure, and of who suffers what, when.")] = 0,
    processes: Annotated[int, typer.Option(help="How many share the boards.")] = 1,
    faults: Annotated[list[str] | None, typer.Option(help=FAULTS_HELP)] = None,
    updates: Annotated[
        Path | None, typer.Option(help="Update repository of 'fieldvit publish' that the boards follow.")
    ] = None,
    channel: Annotated[str, typer.Option(help="Its channel.")] = "stable",
    report: Annotated[
        Path | None, typer.Option(help="Write what each board sent, saw acknowledged and dropped, as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")] = False,
) -> None:
    """Run a fleet of simulated boards against a real broker, with faults; starts a broker if none is given."""
    from host.simulate.config import SimulationConfig
    from host.simulate.faults import parse_fault
    from host.simulate.run import run_simulation, summary

    config = SimulationConfig(
        devices=devices,
        site=site,
        board=board,
        interval_s=rate,
        duration_s=duration,
        seed=seed,
        processes=processes,
        faults=tuple(map(parse_fault, faults or ())),
        updates=updates,
        channel=channel,
    )
    result = run_simulation(
        config,
        broker=broker,
        password_file=broker_password_file,
        broker_hostname=broker_host,
        broker_port=broker_port,
        report=report,
        tell=tell_progress,
    )
    shown = {name: value for name, value in result.items() if name != "boards"}
    print(json.dumps(shown, indent=1) if as_json else summary(result))
