"""Run the device's test suite under tflite-runtime, as boards have it that no LiteRT wheel fits, and count.

    python -m bench.legacy_runtime      # 'make test-legacy' is the same without writing the table

Two environments: agents and commands are processes of `.venv-legacy`, which holds what a board installs; the tests
themselves run in `.venv-legacy-test`, which has the same runtime and what tests need besides. The model is converted in
this environment, so its golden outputs are LiteRT's: boards with tflite-runtime must reproduce them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from bench.record import RESULTS, write_results
from host.errors import BenchError

NAME = "legacy_runtime"
ROOT = Path(__file__).parents[1]
BOARD, TESTS = ".venv-legacy", ".venv-legacy-test"
OUTCOMES = ("passed", "skipped", "failed")
SUITE = "tests/device"
LIMIT_S = 3600
CONVERT = """
import sys
from pathlib import Path
from tests.support.tiny_bundle import save_tiny_models
save_tiny_models(Path(sys.argv[1]))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{NAME}", description=str(__doc__).splitlines()[0])
    parser.add_argument("--no-record", action="store_true", help="only say the counts, write no table")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        report = run(Path(directory), processes=arguments.processes)
    counts = count(report)
    total = sum(counts.values(), Counter())
    for reason, number in sorted(reasons(report).items()):
        print(f"skipped {number}: {reason}")
    print(f"{runtime_of(python_of(BOARD))}: " + ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES))
    if not arguments.no_record:
        record(report)
    return 1 if total["failed"] or not total["passed"] else 0


def run(directory: Path, *, processes: int) -> ElementTree.Element:
    """Run the suite under tflite-runtime; returns pytest's JUnit report.

    Raises:
        BenchError: an environment is missing, the model cannot be converted, or pytest wrote no report.
    """
    board, python = python_of(BOARD), python_of(TESTS)
    converted = subprocess.run([sys.executable, "-c", CONVERT, str(directory)], cwd=ROOT, timeout=LIMIT_S, check=False)
    if converted.returncode:
        raise BenchError(f"the tests' model cannot be converted (exit code {converted.returncode}); see above")
    path = directory / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-n", str(processes), "--dist", "worksteal", f"--junitxml={path}"]
    environment = os.environ | {
        "FIELDVIT_DEVICE_PYTHON": str(board),
        "FIELDVIT_TINY_MODELS": str(directory),
        "PYTHONPATH": str(ROOT),
    }
    tested = subprocess.run([*command, SUITE], cwd=ROOT, env=environment, timeout=LIMIT_S, check=False)
    if tested.returncode not in (0, 1):  # 1: tests failed; anything else, and the report tells of a part of them
        raise BenchError(f"pytest of {TESTS} did not come to its end (exit code {tested.returncode}); see above")
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise BenchError(f"pytest of {TESTS} wrote no report ({error}); see above") from error


def count(report: ElementTree.Element) -> dict[str, Counter[str]]:
    """Outcomes by test module."""
    counts: dict[str, Counter[str]] = {}
    for case in report.iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2] or case.get("name", "")
        counts.setdefault(module, Counter())[outcome_of(case)] += 1
    return dict(sorted(counts.items()))


def outcome_of(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


def reasons(report: ElementTree.Element) -> Counter[str]:
    """Why tests were skipped."""
    return Counter(skip.get("message", "") for skip in report.iter("skipped"))


def record(report: ElementTree.Element, directory: Path = RESULTS) -> Path:
    """Write the table: a row for each test module, and one for all."""
    counts = count(report)
    runtime = runtime_of(python_of(BOARD))
    everything = {"all": sum(counts.values(), Counter()), **counts}
    rows = [
        {"runtime": runtime, "tests": name} | {outcome: number[outcome] for outcome in OUTCOMES}
        for name, number in everything.items()
    ]
    skipped = "; ".join(f"{reason} ({number})" for reason, number in sorted(reasons(report).items()))
    return write_results(
        NAME,
        command=f"python -m bench.{NAME}",
        seed=None,
        data=f"{SUITE}, with the tests' own small model, whose golden outputs are LiteRT's",
        rows=rows,
        title="The device's tests under tflite-runtime",
        notes=f"Skipped: {skipped or 'none'}. Without the tests that are marked slow.",
        directory=directory,
    )


def python_of(environment: str) -> Path:
    """The interpreter of an environment that the Makefile makes; BenchError where it was not made."""
    if not (ROOT / environment / ".stamp").is_file():
        raise BenchError(f"{environment} is not there; make test-legacy makes it")
    return ROOT / environment / "bin" / "python"


def runtime_of(python: Path) -> str:
    """The TFLite runtime that an agent of this interpreter has."""
    command = [str(python), "-c", "from device.runtime import runtime_name; print(runtime_name())"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
