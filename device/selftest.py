"""Prove one artifact in a process of its own: a damaged model can kill the process that loads it.

    python -m device.selftest SLOT --precision int8 --json

Checks every file of the slot against its manifest, loads the model, compares the golden outputs, and measures latency and
peak memory. Exit code 0 and a report on standard output, or one `error: ...` line and the error's exit code. The process
ends itself after `--timeout` seconds, so that it does not outlive an agent that was killed.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from device.contract.errors import ArtifactError, DeviceError
from device.contract.records import from_table

TIMEOUT_S = 120.0
GRACE_S = 10.0
"""A child that hangs where even its alarm does not end it is killed so much later."""
_ERROR = "error: "
WARM_UP = 3
REPEATS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What one artifact does on this board. `golden_difference` is relative to the largest golden value."""

    precision: str
    golden_difference: float
    load_s: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    peak_memory_mb: float


def run_in_child(slot: Path, precision: str, *, threads: int, timeout_s: float = TIMEOUT_S) -> SelfTest:
    """Test an artifact in a child process.

    Raises:
        ArtifactError: it failed, crashed or took too long; the message says which.
    """
    command = [sys.executable, "-m", "device.selftest", str(slot), "--precision", precision, "--json"]
    command += ["--threads", str(threads), "--timeout", str(timeout_s)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s + GRACE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(f"{precision}: the self-test was killed after {timeout_s + GRACE_S:.0f} s") from error
    if child.returncode == -signal.SIGALRM:
        raise ArtifactError(f"{precision}: the self-test did not end within {timeout_s:.0f} s")
    if child.returncode < 0:
        raise ArtifactError(f"{precision}: the self-test was killed by {signal.Signals(-child.returncode).name}")
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.startswith(_ERROR)] or child.stderr.splitlines()
        raise ArtifactError(f"{precision}: {(lines or ['no message'])[-1].removeprefix(_ERROR)}")
    return from_table(SelfTest, json.loads(child.stdout), where="self-test", error=ArtifactError)


def run_here(slot: Path, precision: str, *, threads: int) -> SelfTest:
    """Test an artifact in this process; ArtifactError or EngineError says what is wrong."""
    import numpy as np  # here: the parent only starts the child and needs none of this

    from device.classifier import read_base_head
    from device.contract.bundle import verify_directory
    from device.engine import Engine
    from device.golden import GOLDEN_NAME, check_golden, read_arrays
    from device.preprocess import preprocess
    from device.telemetry import peak_memory_bytes

    manifest = verify_directory(slot)
    artifact = manifest.artifact(precision)
    started = time.monotonic()
    engine = Engine(slot / artifact.path, num_threads=threads)
    load_s = time.monotonic() - started
    difference = check_golden(engine, slot, manifest.input, artifact, read_base_head(slot, manifest, artifact).learner)
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
    )


def report_lines(result: SelfTest) -> list[str]:
    """The report for people."""
    return [
        f"{result.precision}: passed",
        f"  golden frames: same answers, features within {result.golden_difference:.2g} of the largest value",
        f"  latency: p50 {result.latency_p50_ms:.2f} ms, p90 {result.latency_p90_ms:.2f} ms, p99 {result.latency_p99_ms:.2f} ms",
        f"  peak memory: {result.peak_memory_mb:.0f} MB, load {result.load_s:.2f} s",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m device.selftest", description="Prove one artifact of an extracted bundle."
    )
    parser.add_argument("slot", type=Path, help="directory of the extracted bundle")
    parser.add_argument("--precision", required=True, help="which artifact, for example int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds until this process ends itself")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    # SIGALRM's default action ends the process, also inside C code
    signal.setitimer(signal.ITIMER_REAL, arguments.timeout)
    try:
        result = run_here(arguments.slot, arguments.precision, threads=arguments.threads)
    except DeviceError as error:
        print(_ERROR + " ".join(str(error).split()), file=sys.stderr)  # one line: the parent reads it
        return error.exit_code
    print(json.dumps(asdict(result)) if arguments.json else "\n".join(report_lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
