"""Prove one artifact in a process of its own: a damaged model can kill the process that loads it.

    python -m device.selftest SLOT --precision int8 --json

Checks every file of the slot against its manifest, loads the model, compares the golden outputs, and measures latency and
peak memory. Exit code 0 and a report on standard output, or one `error: ...` line and the error's exit code.

The child has a process group of its own: Ctrl-C in a terminal, or a signal to the agent's group, must not look like a model
that crashed. So that it does not outlive an agent that was killed, the child ends when its standard input does
(`--end-with-parent`), and after `--timeout` seconds in any case.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from device.contract.board import PROCESSOR
from device.contract.errors import (
    ArtifactError,
    DeviceError,
    InterruptedTestError,
    NoVerdictError,
    RuntimeMismatchError,
)
from device.contract.record import record
from device.contract.records import from_table

TIMEOUT_S = 120.0
GRACE_S = 10.0
"""A child that hangs where even its alarm does not end it is killed so much later."""
POLL_S = 0.1
_ERROR = "error: "
WARM_UP = 3
REPEATS = 20


@record(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What one artifact does on this board. `golden_difference` is relative to the largest golden value."""

    precision: str
    golden_difference: float
    load_s: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    peak_memory_mb: float
    delegate: str = PROCESSOR


def run_in_child(
    slot: Path,
    precision: str,
    *,
    threads: int,
    delegate: str = PROCESSOR,
    caches: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    stop: threading.Event | None = None,
) -> SelfTest:
    """Test an artifact in a child process.

    Args:
        slot: directory of the extracted bundle.
        precision: which artifact.
        threads: of the interpreter.
        delegate: as in the board profile's `runtime.delegate`.
        caches: the agent will serve it with a weight cache, so that is tested too, with one in this directory.
        timeout_s: how long the child may take.
        stop: ends the test when it is set.

    Raises:
        RuntimeMismatchError: the runtime of this board cannot run it.
        ArtifactError: it failed or crashed; the message says which.
        NoVerdictError: it took too long, or was killed as the system does when memory runs out.
        InterruptedTestError: `stop` was set, somebody ended the child, or it could not be started.
    """
    command = [sys.executable, "-m", "device.selftest", str(slot), "--precision", precision, "--json"]
    command += ["--threads", str(threads), "--delegate", delegate, "--timeout", str(timeout_s), "--end-with-parent"]
    command += ["--caches", str(caches)] if caches else []
    stop = stop or threading.Event()
    try:
        with _child(command) as child:
            output, errors = _wait(child, precision, timeout_s + GRACE_S, stop)
    except OSError as error:
        raise InterruptedTestError(f"{precision}: the self-test could not be started ({error})") from error
    if child.returncode and stop.is_set():
        raise InterruptedTestError(f"{precision}: the self-test was stopped")
    _require_success(child.returncode, errors, precision, timeout_s)
    return _parse_report(output, precision)


@contextmanager
def _child(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end of the block; its standard input ends when this process does."""
    read_end, write_end = os.pipe()
    try:
        with subprocess.Popen(
            command, stdin=read_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
        ) as child:
            try:
                yield child
            finally:
                child.kill()
    finally:
        os.close(read_end)
        os.close(write_end)


def _wait(
    child: subprocess.Popen[bytes], precision: str, timeout_s: float, stop: threading.Event
) -> tuple[bytes, bytes]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return child.communicate(timeout=POLL_S)
        except subprocess.TimeoutExpired as error:
            if stop.is_set():
                raise InterruptedTestError(f"{precision}: the self-test was stopped") from error
            if time.monotonic() > deadline:
                raise NoVerdictError(f"{precision}: the self-test was killed after {timeout_s:.0f} s") from error


def _require_success(exit_code: int, errors: bytes, precision: str, timeout_s: float) -> None:
    if exit_code == -signal.SIGALRM:
        raise NoVerdictError(f"{precision}: the self-test did not end within {timeout_s:.0f} s")
    if exit_code < 0:
        names = {number.value: number.name for number in signal.Signals}
        message = f"{precision}: the self-test was killed by {names.get(-exit_code, f'signal {-exit_code}')}"
        if -exit_code in (signal.SIGTERM, signal.SIGINT):
            raise InterruptedTestError(message)
        raise NoVerdictError(message) if exit_code == -signal.SIGKILL else ArtifactError(message)
    if exit_code:
        text = errors.decode(errors="replace").splitlines()
        lines = [line for line in text if line.startswith(_ERROR)] or text
        message = f"{precision}: {(lines or ['no message'])[-1].removeprefix(_ERROR)}"
        raise (RuntimeMismatchError if exit_code == RuntimeMismatchError.exit_code else ArtifactError)(message)


def _parse_report(output: bytes, precision: str) -> SelfTest:
    """The report is the last line: a library may have written to standard output before."""
    line = (output.decode(errors="replace").splitlines() or [""])[-1]
    try:
        return from_table(SelfTest, json.loads(line), where="self-test", error=ArtifactError)
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"{precision}: the self-test wrote no report, but {line[:80]!r}") from error


def run_here(
    slot: Path, precision: str, *, threads: int, delegate: str = PROCESSOR, caches: Path | None = None
) -> SelfTest:
    """Test an artifact in this process; ArtifactError or EngineError says what is wrong."""
    import numpy as np  # here: the parent only starts the child and needs none of this

    from device.backbone import open_backbone
    from device.classifier import read_base_head
    from device.contract.bundle import verify_directory
    from device.golden import GOLDEN_NAME, check_golden, check_labels, read_arrays
    from device.preprocess import preprocess
    from device.telemetry import peak_memory_bytes

    manifest = verify_directory(slot)
    check_labels(slot, manifest)
    artifact = manifest.artifact(precision)
    started = time.monotonic()
    engine = open_backbone(slot, manifest, artifact, threads=threads, delegate=delegate)
    load_s = time.monotonic() - started
    base_head = read_base_head(slot, manifest, artifact).learner
    difference = check_golden(engine, slot, manifest.input, artifact, base_head)
    if caches:  # after the interpreter, which refuses what CompiledModel dies of
        del engine
        engine = open_backbone(slot, manifest, artifact, threads=threads, delegate=delegate, caches=caches)
        difference = max(difference, check_golden(engine, slot, manifest.input, artifact, base_head))
    frame = preprocess(read_arrays(slot / GOLDEN_NAME)["frames"][:1], manifest.input)
    latencies_ms = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        engine.features(frame)
        latencies_ms.append((time.perf_counter() - started) * 1000)
    p50, p90, p99 = np.percentile(latencies_ms[WARM_UP:], [50, 90, 99])
    return SelfTest(
        precision=precision,
        golden_difference=difference,
        load_s=load_s,
        latency_p50_ms=float(p50),
        latency_p90_ms=float(p90),
        latency_p99_ms=float(p99),
        peak_memory_mb=peak_memory_bytes() / (1 << 20),
        delegate=engine.delegate,
    )


def report_lines(result: SelfTest) -> list[str]:
    """The report for people."""
    return [
        f"{result.precision}: passed",
        f"  golden frames: same answers, features within {result.golden_difference:.2g} of the largest value",
        f"  latency: p50 {result.latency_p50_ms:.2f} ms, p90 {result.latency_p90_ms:.2f} ms, p99 {result.latency_p99_ms:.2f} ms",
        f"  peak memory: {result.peak_memory_mb:.0f} MB, load {result.load_s:.2f} s, on {result.delegate}",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m device.selftest", description="Prove one artifact of an extracted bundle."
    )
    parser.add_argument("slot", type=Path, help="directory of the extracted bundle")
    parser.add_argument("--precision", required=True, help="which artifact, for example int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--delegate", default=PROCESSOR, help="what runs it, as in the board profile")
    parser.add_argument(
        "--caches", type=Path, help="test it with a weight cache too, in this directory, which is emptied"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds until this process ends itself")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input does")
    arguments = parser.parse_args(argv)
    # SIGALRM's default action ends the process, also inside C code
    signal.setitimer(signal.ITIMER_REAL, arguments.timeout)
    if arguments.end_with_parent:
        threading.Thread(target=_end_with_input, name="parent", daemon=True).start()
    try:
        with _emptied(arguments.caches):
            result = run_here(
                arguments.slot,
                arguments.precision,
                threads=arguments.threads,
                delegate=arguments.delegate,
                caches=arguments.caches,
            )
    except DeviceError as error:
        print(_ERROR + " ".join(str(error).split()), file=sys.stderr)  # one line: the parent reads it
        return error.exit_code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(asdict(result)) if arguments.json else "\n".join(report_lines(result)))
    return 0


@contextmanager
def _emptied(directory: Path | None) -> Iterator[None]:
    """Without what a child that was killed left in it, and gone afterwards."""
    if directory is None:
        yield
        return
    shutil.rmtree(directory, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(InterruptedTestError.exit_code)


if __name__ == "__main__":
    sys.exit(main())
