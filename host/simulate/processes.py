"""Several processes that share the boards of a simulation: each has an event loop, and reports over a pipe."""

import asyncio
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any

from paho.mqtt.enums import MQTTProtocolVersion

from host.errors import HostError
from host.monitor.broker import BrokerAddress
from host.simulate.broker import BrokerChoice
from host.simulate.config import SimulationConfig
from host.simulate.fleet import Fleet
from host.simulate.ledger import add_totals
from host.simulate.release import Release

PROGRESS_S = 5.0
POLL_S = 0.2
END_S = 5.0
Progress = Callable[[dict[str, int]], None]


class ShareError(HostError, RuntimeError):
    """A process that carried some of the boards has ended by itself."""

    exit_code = 1


def run_here(
    config: SimulationConfig,
    broker: BrokerAddress,
    protocol: MQTTProtocolVersion,
    release: Release,
    *,
    stop: threading.Event,
    on_progress: Progress,
) -> dict[str, Any]:
    """Run all boards in this process until `stop` is set or the duration is over; see `Fleet.run`."""
    fleet = Fleet(config, range(1, config.devices + 1), broker=broker, protocol=protocol, release=release)
    return asyncio.run(_run(fleet, stop, on_progress))


def run_in_processes(
    config: SimulationConfig,
    choice: BrokerChoice,
    protocol: MQTTProtocolVersion,
    release: Release,
    *,
    stop: threading.Event,
    on_progress: Progress,
) -> dict[str, Any]:
    """Run the boards in `config.processes` processes; like `run_here`.

    Raises:
        ShareError: one of them ended before its time.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    shares = []
    try:
        for share in range(config.processes):
            numbers = range(1 + share, config.devices + 1, config.processes)
            near, far = context.Pipe()
            shares.append(near)
            arguments = (config, choice, protocol, release, numbers, far)
            context.Process(target=_run_share, args=arguments, name=f"boards-{share}").start()
            far.close()
        results = _collect(shares, stop, on_progress)
    finally:
        for near in shares:
            near.close()  # which ends a process that still runs
        for process in multiprocessing.active_children():
            process.join(timeout=END_S)
    return {
        "totals": _sum([result["totals"] for result in results]),
        "boards": dict(sorted(item for result in results for item in result["boards"].items())),
        "cpu_s": sum(result["cpu_s"] for result in results),
    }


def _collect(shares: list[Pipe], stop: threading.Event, on_progress: Progress) -> list[dict[str, Any]]:
    """Pass on that it is time to stop, and gather what the processes say until each has given its result."""
    waiting, is_told = list(shares), False
    latest: dict[int, dict[str, int]] = {}
    results = []
    while waiting:
        if stop.is_set() and not is_told:
            is_told = True
            for near in waiting:
                with contextlib.suppress(OSError):
                    near.send("stop")
        for near in [near for near in waiting if near in wait(waiting, timeout=POLL_S)]:
            kind, said = _receive(near)
            if kind == "result":
                results.append(said)
                waiting.remove(near)
                continue
            latest[shares.index(near)] = said
            if len(latest) == len(shares):
                on_progress(_sum(list(latest.values())))
                latest.clear()
    return results


def _receive(near: Pipe) -> tuple[str, dict[str, Any]]:
    try:
        kind, said = near.recv()
    except EOFError as error:
        raise ShareError("a process with simulated boards ended by itself; its error stands above") from error
    return kind, said


def _run_share(
    config: SimulationConfig,
    choice: BrokerChoice,
    protocol: MQTTProtocolVersion,
    release: Release,
    numbers: range,
    pipe: Pipe,
) -> None:
    """In a process of its own: run some boards, and leave signals to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()
    fleet = Fleet(config, numbers, broker=choice.address(), protocol=protocol, release=release)
    threading.Thread(target=_hear_stop, args=(pipe, stop), daemon=True).start()
    result = asyncio.run(_run(fleet, stop, lambda totals: pipe.send(("progress", totals))))
    pipe.send(("result", result))


def _hear_stop(pipe: Pipe, stop: threading.Event) -> None:
    """Stop when told to, and when whoever would tell is gone."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    stop.set()


async def _run(fleet: Fleet, stop: threading.Event, on_progress: Progress) -> dict[str, Any]:
    stopping = asyncio.Event()
    watcher = asyncio.ensure_future(_watch(stop, stopping))
    try:
        return await fleet.run(stopping, on_progress=on_progress, progress_s=PROGRESS_S)
    finally:
        watcher.cancel()


async def _watch(stop: threading.Event, stopping: asyncio.Event) -> None:
    while not stop.is_set():
        await asyncio.sleep(0.1)
    stopping.set()


def _sum(tables: list[dict[str, int]]) -> dict[str, int]:
    return add_totals(tables) | {"connected": sum(table["connected"] for table in tables)}
