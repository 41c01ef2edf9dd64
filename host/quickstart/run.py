"""`fieldvit quickstart`: the whole loop on scikit-learn's handwritten digits, ending in figures and a report.

The host learns the classes 0 to 7; 8 and 9 are taught on the board. Half of the images are the test split, and no choice
is made on them. Host stages are cached, so an interrupted quickstart goes on where it was; the field part starts afresh.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

from device.contract.bundle import read_manifest
from device.contract.files import write_atomic
from host.errors import FleetError, QuickstartError
from host.machine import describe_machine
from host.memory import TreeMemory
from host.monitor.broker import check_broker_choice
from host.pipeline import Report, stage_metrics
from host.quickstart.field import FieldTrial, fresh_directory, run_trial
from host.quickstart.metrics import missed_bounds, quickstart_metrics
from host.quickstart.processes import DeviceCommand, agent_process, find_device_python, monitor_process, only_one
from host.quickstart.story import summary, write_report
from host.recipe import Recipe, builtin_recipe
from host.stages.data import load_split
from host.stages.export import bundle_name
from host.stages.order import ORDER, run_recipe
from host.terminal import StageLines

SHORT_EPOCHS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartConfig:
    """Options of the verb. `device_python` is found beside this environment when it is None."""

    seed: int = 0
    runs: Path = Path("runs")
    device_python: Path | None = None
    broker: str = "auto"
    short: bool = False
    keep_running: bool = False


def run_quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run the loop; returns what `metrics.json` holds.

    Raises:
        QuickstartError: it ran to its end, but a bad update got in or, not in the short form, a figure missed its bound.
        HostError, DeviceError, ConversionError: a step failed; the message says which and what to do.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # else they would end us without ending board and monitor
        signal.signal(number, _interrupt)
    started = time.monotonic()
    python = find_device_python(config.device_python)
    check_broker_choice(config.broker)
    recipe = quickstart_recipe(seed=config.seed, short=config.short)
    with only_one(config.runs / recipe.name), closing(StageLines()) as lines, TreeMemory() as memory:
        directory = run_recipe(recipe, config.runs, until=ORDER[-1], report=lines)
        bundle = directory / "export" / bundle_name(recipe)
        host_seconds = time.monotonic() - started
        with _running_board(directory, bundle, python, config.broker, lines) as (trial, agent):
            split = load_split(recipe)
            record = run_trial(trial, agent, split, lines)
            lines.close()
            metrics = quickstart_metrics(record, split) | _host_metrics(directory, bundle)
            metrics |= {"seed": config.seed, "host_seconds": host_seconds, "seconds": time.monotonic() - started}
            metrics["peak_memory_mb"] = memory.peak_bytes / 1e6
            write_atomic(directory / "metrics.json", (json.dumps(metrics, indent=1, sort_keys=True) + "\n").encode())
            report = write_report(
                directory, manifest=read_manifest(bundle), split=split, record=record, metrics=metrics
            )
            print(summary(metrics, report))
            if config.keep_running:
                _keep_running(record.page, agent)
    if missed := missed_bounds(metrics, training_too=not config.short):
        raise QuickstartError(f"the quickstart ran, but {'; '.join(missed)}; see {report}")
    return metrics


@contextmanager
def _running_board(
    directory: Path, bundle: Path, python: Path, broker: str, report: Report
) -> Iterator[tuple[FieldTrial, "Popen[bytes]"]]:
    """Monitor and agent, running, on a freshly flashed board."""
    work = fresh_directory(directory / "field")
    device = DeviceCommand(python, work / "board")
    with monitor_process(work, broker=broker) as monitor:
        trial = FieldTrial(work, bundle=bundle, device=device, monitor=monitor, report=report)
        trial.flash()
        with agent_process(device, log=trial.log) as agent:
            yield trial, agent


def quickstart_recipe(*, seed: int, short: bool) -> Recipe:
    """The recipe that ships with the package, for a seed; `short` trains for a few epochs only."""
    recipe = builtin_recipe("quickstart")
    name = recipe.name if seed == recipe.seed else f"{recipe.name}-seed{seed}"
    if short:
        train = replace(recipe.train, epochs=SHORT_EPOCHS)
        teacher = recipe.teacher and replace(recipe.teacher, train=replace(recipe.teacher.train, epochs=SHORT_EPOCHS))
        return replace(recipe, name=f"{name}-short", seed=seed, train=train, teacher=teacher)
    return replace(recipe, name=name, seed=seed)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _host_metrics(directory: Path, bundle: Path) -> dict[str, Any]:
    """What the host measured when it exported, from the manifest and the stage stamps."""
    manifest = read_manifest(bundle)
    return {
        "base_accuracy_torch": manifest.float_accuracy,
        "tflite_argmax_agreement": manifest.artifact("float32").argmax_agreement,
        "int8_argmax_agreement": manifest.artifact("int8").argmax_agreement,
        "coreml_argmax_agreement": manifest.coreml.argmax_agreement if manifest.coreml else None,
        "bundle_sha256": stage_metrics(directory, "export")["bundle_sha256"],
        "machine": describe_machine(),
    }


def _keep_running(page: str, agent: "Popen[bytes]") -> None:
    """Leave board and monitor up until Ctrl-C."""
    print(f"board and monitor keep running; the page is {page} (Ctrl-C ends both)", flush=True)
    try:
        agent.wait()
    except KeyboardInterrupt:
        print("board and monitor are being stopped", flush=True)
        return
    raise FleetError("the agent ended by itself; see agent.log beside the board's directory")
