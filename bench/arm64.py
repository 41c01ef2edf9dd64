"""Run the device's tests on 64-bit ARM, emulated, and write the table `arm64`.

    python -m bench.arm64 [--only PART]

Three kinds of checks: the device extra resolves to binary wheels; artifacts give the outputs that they give here; and each
file of `tests/device` passes, in an emulated arm64 Debian (`bench.arm64_root`) that is made in `build/arm64` on first use.
What needs PyTorch is made here and handed over. A test that cannot run there says why it is skipped.

A check is done anew when its code changed, and a test file also when the device did. An emulator's times say nothing about
a board, and an emulated processor cannot prove a real one right: this finds what a wheel, a compiler or a byte order breaks.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from bench.arm64_outputs import golden_outputs
from bench.arm64_root import PYTHON, ROOT, Arm64, Arm64Error
from bench.arm64_wheels import PYTHONS, device_requirements, resolve_wheels
from bench.jobs import Job, Table, digest, digest_code, main_of
from bench.record import Row
from device.contract.bundle import extract
from tests.support.tiny_bundle import convert_tiny_model, save_tiny_models, write_bundle

HOME = ROOT / "build" / "arm64"
ZOO = "efficientformer-field-32-cifar10"
MATMUL = "import numpy as np; ones = np.ones((64, 64), 'f4'); print(np.unique(ones @ ones))"
TEST_TIMEOUT_S = 7200.0
TEST_ENVIRONMENT = {
    "FIELDVIT_PATIENCE": "20",
    "FIELDVIT_TINY_MODELS": "/",
    "FIELDVIT_DEVICE_PYTHON": PYTHON,
    "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
}
MAX_NAMES = 5


def main(argv: Sequence[str] | None = None) -> int:
    table = Table(
        name="arm64",
        command="python -m bench.arm64",
        data="the tests of the device, the tiny model of the tests, and the zoo's " + ZOO,
        title="The device on emulated 64-bit ARM",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv)


def list_jobs() -> list[Job]:
    """The cheap ones first."""
    device = digest_code(*sorted((ROOT / "device").rglob("*.py")))
    emulator = digest_code(ROOT / "bench" / "arm64_root.py")
    wheels = digest(device_requirements(), _constraints().read_text(encoding="utf-8"))
    return [
        *(Job(key={"check": f"wheels, Python {python}"}, defined_by=wheels) for python in PYTHONS),
        Job(key={"check": "a product of matrices"}, defined_by=digest(emulator, MATMUL)),
        *(Job(key={"check": f"outputs, {name}"}, defined_by=digest(emulator, device)) for name in ("tiny", ZOO)),
        *(
            Job(
                key={"check": path.relative_to(ROOT).as_posix()},
                defined_by=digest(emulator, device, digest_code(path)),
                settings=TEST_ENVIRONMENT,
            )
            for path in sorted((ROOT / "tests" / "device").glob("test_*.py"))
        ),
    ]


def measure(job: Job) -> Row:
    """Do one check; the row says how often it held, and what did not."""
    kind, _, subject = str(job.key["check"]).partition(", ")
    start = time.monotonic()
    if kind == "wheels":
        row = check_wheels(subject.removeprefix("Python "))
    elif kind == "a product of matrices":
        row = check_product(Arm64.make(HOME))
    elif kind == "outputs":
        row = compare_outputs(Arm64.make(HOME), subject)
    else:
        row = run_tests(Arm64.make(HOME), kind)
    return row | {"seconds": round(time.monotonic() - start)}


def check_wheels(python: str) -> Row:
    """Resolve the device extra for aarch64, to nothing but wheels."""
    wheels = resolve_wheels(device_requirements(), python, constraints=_constraints())
    ours = [name for name, file in wheels.items() if file.endswith("aarch64.whl")]
    return _row(passed=len(wheels), detail=f"{len(wheels)} wheels; of aarch64: {', '.join(ours)}")


def check_product(system: Arm64) -> Row:
    """The arithmetic that emulators have got wrong: each of these sums is 64."""
    done = system.run([PYTHON, "-c", MATMUL])
    is_right = done.stdout.strip() == "[64.]"
    said = done.stdout.strip() or done.stderr.strip()[-200:]
    version = system.run([PYTHON, "--version"]).stdout.strip()
    return _row(passed=int(is_right), failed=int(not is_right), detail=f"{system.emulator}, {version}: {said}")


def compare_outputs(system: Arm64, name: str) -> Row:
    """The golden frames of a bundle, here and there. Failed are those that get another answer."""
    target = system.path(f"/bundles/{name}")
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as made:
            extract(_BUNDLES[name](Path(made)), target)
    here = golden_outputs(target)
    done = system.run([PYTHON, "-m", "bench.arm64_outputs", f"/bundles/{name}", "/outputs.npz"])
    if done.returncode:
        raise Arm64Error(f"{name}: {done.stderr.strip()[-500:]}")
    there = np.load(system.path("/outputs.npz"))
    row, details = _row(), []
    for precision in sorted(key.removesuffix("/features") for key in here if key.endswith("/features")):
        features, answers = here[f"{precision}/features"], here[f"{precision}/answers"]
        difference = np.abs(there[f"{precision}/features"] - features).max() / np.abs(features).max()
        same = int((there[f"{precision}/answers"] == answers).sum())
        row["passed"] += same
        row["failed"] += len(answers) - same
        row[f"{precision}_difference"] = float(difference)
        details.append(f"{precision}: {same} of {len(answers)} answers the same")
    return row | {"detail": "; ".join(details)}


def run_tests(system: Arm64, file: str) -> Row:
    """Run one file of tests."""
    if not system.path("tiny-1.npz").exists():
        with tempfile.TemporaryDirectory() as made:
            for path in save_tiny_models(Path(made)):
                system.add(path, path.name)
    report = system.path("/report.xml")
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "--basetemp=/tmp/pytest", "--junitxml=/report.xml"]
    done = system.run([PYTHON, "-m", "pytest", *options, file], environment=TEST_ENVIRONMENT, timeout_s=TEST_TIMEOUT_S)
    if not report.exists():
        raise Arm64Error(f"{file}: pytest wrote no report: {(done.stdout + done.stderr).strip()[-500:]}")
    return summarize(ElementTree.fromstring(report.read_bytes()))


def summarize(report: ElementTree.Element) -> Row:
    """Counts of a pytest report in JUnit's XML; failed tests by name, skipped ones by reason."""
    outcomes = [(case.get("name", ""), *_outcome(case)) for case in report.iter("testcase")]
    counts = Counter(outcome for _, outcome, _ in outcomes)
    failed = [name for name, outcome, _ in outcomes if outcome == "failed"]
    skipped = Counter(reason for _, outcome, reason in outcomes if outcome == "skipped")
    details = (
        [f"failed: {', '.join(failed[:MAX_NAMES])}" + (", …" if len(failed) > MAX_NAMES else "")] if failed else []
    )
    details += [f"skipped {count}: {reason}" for reason, count in skipped.items()]
    return _row(**counts, detail="; ".join(details))


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", ""
        if child.tag == "skipped":
            return "skipped", child.get("message", "")
    return "passed", ""


def _row(*, passed: int = 0, skipped: int = 0, failed: int = 0, detail: str = "") -> dict[str, object]:
    return {"passed": passed, "skipped": skipped, "failed": failed, "detail": detail}


def _tiny(directory: Path) -> Path:
    return write_bundle(directory, convert_tiny_model(directory))


def _zoo(directory: Path) -> Path:
    """The checkpoint, exported as a user would."""
    command = [sys.executable, "-m", "host.cli", "run", f"zoo:{ZOO}", "--runs", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Arm64Error(f"fieldvit run zoo:{ZOO}: {done.stderr.strip()[-300:]}")
    (bundle,) = directory.rglob("*.fieldvit")
    return bundle


_BUNDLES: dict[str, Callable[[Path], Path]] = {"tiny": _tiny, ZOO: _zoo}


def _constraints() -> Path:
    return ROOT / "constraints" / "device.txt"


def _notes(rows: Sequence[Row]) -> str:
    return "\n\n".join(_paragraphs(rows))


def _paragraphs(rows: Sequence[Row]) -> Iterator[str]:
    tests = [row for row in rows if str(row["check"]).startswith("tests/")]
    sums = {name: sum(int(row[name]) for row in tests) for name in ("passed", "skipped", "failed")}
    yield (
        f"{len(rows)} of {len(list_jobs())} checks are up to date. Of the device's tests {sums['passed']} passed, "
        f"{sums['skipped']} were skipped, {sums['failed']} failed. `passed` counts wheels, golden frames or tests; "
        "differences are relative to the largest feature, between this machine's kernels and ARM's. Seconds are the "
        "emulator's, beside whatever else ran, and say nothing about a board."
    )
    yield "Debian's packages were unpacked, none of their scripts was run; tests of systemd and PyTorch are skipped there."


if __name__ == "__main__":
    sys.exit(main())
