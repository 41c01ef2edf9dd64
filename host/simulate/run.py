"""`fieldvit simulate`: a broker, the boards, a line every few seconds, and the report."""

import json
import resource
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from device.contract.files import write_atomic
from host.errors import MonitorError
from host.monitor.broker import DEFAULT_PORT, start_broker
from host.signals import stop_on_signals
from host.simulate.broker import BrokerChoice
from host.simulate.config import SimulationConfig
from host.simulate.fleet import find_release
from host.simulate.link import find_protocol
from host.simulate.processes import run_here, run_in_processes

REPORT_SCHEMA = 1
OTHER_FILES = 64
Tell = Callable[[str], None]


def run_simulation(
    config: SimulationConfig,
    *,
    broker: str = "auto",
    password_file: Path | None = None,
    broker_hostname: str = "127.0.0.1",
    broker_port: int = DEFAULT_PORT,
    report: Path | None = None,
    stop: threading.Event | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Run a simulated fleet until its duration is over, SIGINT, SIGTERM or `stop`; then end in good order.

    Args:
        config: the fleet.
        broker: HOST:PORT, a URL, or a kind of broker to start here.
        password_file: its first line is the password for that URL.
        broker_hostname: the address that a broker started here listens on.
        broker_port: its port; 0: any free one.
        report: where the report is written, as JSON.
        stop: ends it.
        tell: gets lines for a person.

    Returns:
        The report.

    Raises:
        MonitorError: the broker's address is wrong, its port is taken, or the report cannot be written.
        BrokerError: the broker cannot be reached or refuses the login.
        UpdateRefusedError: the update repository cannot be followed.
    """
    stop = stop or threading.Event()
    choice = BrokerChoice.parse(broker, password_file)
    release = find_release(config)
    raise_file_limit(config.devices // config.processes)
    if report is not None and not report.parent.is_dir():
        raise MonitorError(f"--report {report}: {report.parent} is no directory; make it first")
    with ExitStack() as stack:
        if choice is None:
            running = stack.enter_context(start_broker(broker, broker_hostname, broker_port))
            choice = BrokerChoice(url=f"mqtt://{running.address}")
            tell(f"broker {running.address} ({running.kind}); see it with: fieldvit monitor --broker {choice.url}")
        address = choice.address()
        protocol = find_protocol(address)
        tell(
            f"{config.devices} boards ({config.board}, {release.name} {release.version}) of site {config.site} speak to "
            f"{address}, each every {config.interval_s:g} s; seed {config.seed}, processes {config.processes}"
        )
        for fault in config.faults:
            tell(f"fault {_fault_line(fault)}")
        stack.enter_context(stop_on_signals(stop))
        started, moment = time.monotonic(), datetime.now(UTC)
        watch = _Progress(config.devices, tell)
        if config.processes == 1:
            result = run_here(config, address, protocol, release, stop=stop, on_progress=watch)
        else:
            result = run_in_processes(config, choice, protocol, release, stop=stop, on_progress=watch)
    elapsed_s = time.monotonic() - started
    table = _report(config, result, started=moment, elapsed_s=elapsed_s, broker=str(address))
    if report is not None:
        try:
            write_atomic(report, json.dumps(table, indent=1).encode() + b"\n")
        except OSError as error:
            raise MonitorError(f"--report {report}: cannot be written ({error}); choose another file") from error
        tell(f"report: {report}")
    return table


def raise_file_limit(connections: int) -> None:
    """Allow this process, and those it starts, as many open files as the system lets it.

    Raises:
        MonitorError: that is too few for so many connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard and hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = soft if hard == resource.RLIM_INFINITY else hard
    if connections + OTHER_FILES > allowed:
        raise MonitorError(
            f"{connections} boards in one process need {connections + OTHER_FILES} open files, {allowed} are allowed; "
            "give more --processes, or raise the limit (ulimit -n)"
        )


def summary(report: dict[str, Any]) -> str:
    """What came of it, in one line."""
    totals, elapsed_s = report["totals"], report["elapsed_s"]
    return (
        f"{elapsed_s:.0f} s: {totals['numbered']} messages numbered, {totals['sent']} sent, {totals['acknowledged']} "
        f"acknowledged ({report['messages_per_s']:.0f}/s), {totals['dropped']} dropped, {totals['waiting']} waiting; "
        f"{totals['resent']} copies sent again; {totals['commands']} commands, {totals['replies']} replies; "
        f"processor time {report['cpu_s']:.1f} s"
    )


class _Progress:
    """A line for what happened since the last one."""

    def __init__(self, devices: int, tell: Tell) -> None:
        self._devices, self._tell = devices, tell
        self._started = self._last = time.monotonic()
        self._acknowledged = 0

    def __call__(self, totals: dict[str, int]) -> None:
        now = time.monotonic()
        rate = (totals["acknowledged"] - self._acknowledged) / (now - self._last)
        self._last, self._acknowledged = now, totals["acknowledged"]
        self._tell(
            f"{now - self._started:.0f} s: {totals['connected']} of {self._devices} connected, "
            f"{totals['acknowledged']} acknowledged ({rate:.0f}/s), {totals['waiting']} waiting, {totals['dropped']} dropped"
        )


def _report(
    config: SimulationConfig, result: dict[str, Any], *, started: datetime, elapsed_s: float, broker: str
) -> dict[str, Any]:
    totals = {name: count for name, count in result["totals"].items() if name != "connected"}
    return {
        "schema": REPORT_SCHEMA,
        "started": started.isoformat(timespec="seconds"),
        "elapsed_s": round(elapsed_s, 3),
        "broker": broker,
        "site": config.site,
        "devices": config.devices,
        "board": config.board,
        "interval_s": config.interval_s,
        "seed": config.seed,
        "processes": config.processes,
        "faults": [asdict(fault) for fault in config.faults],
        "messages_per_s": round(totals["acknowledged"] / elapsed_s, 1),
        "cpu_s": round(result["cpu_s"], 2),
        "totals": totals,
        "boards": result["boards"],
    }


def _fault_line(fault: Any) -> str:
    start = f" from {fault.start_s:g} s on" if fault.start_s else ""
    model = f", release {fault.release}: {fault.effect}" if fault.effect else ""
    return f"{fault.kind}: {fault.rate:.2%}{start}{model}"
