"""Take the power from the agent at random moments of installing, confirming, reverting and learning.

    python -m bench.power_cut [--only PART_OF_A_LABEL]

Two kinds of cut, four phases each; the moments follow from the seed and from what the machine does.

- *kill*: the real agent gets SIGKILL; the kernel keeps what was written. 1,000 cuts, each followed by a real start.
- *lost writes*: the real agent runs once through each phase under strace; `bench.disk_log` makes of that what the disk may
  hold when what was not synced is lost, torn or out of order. 1,000 such contents; each is opened by the agent's own code,
  every `START_EVERY`th by a real start that must also take the next update.

After each cut: is there a confirmed model, are its files whole, does it load and give the right answer (else `broken`); do
journal, link and slots agree after recovery, is nothing left over, is the learned state one that was committed, and no
older than what the agent had said over MQTT by then, does the spool open (else `half_applied`). `restart_s` is from the
start of the process until it tells its notify socket that it serves.

A kill is made to look like lost power to the next start (another kernel's boot id): crashes of the agent alone are counted
against a confirmed model on purpose, and have their own tests.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.disk_log import DiskLog, Sent, can_trace, crash_state, lines_of, read_log, snapshot, trace_command
from bench.jobs import Job, Table, digest_code, main_of
from bench.record import Row
from device.contract.board import load_board
from device.contract.bundle import verify_directory
from device.contract.errors import DeviceError
from device.contract.messages import Command, decode_reply, encode_command
from device.engine import Engine
from device.preprocess import preprocess
from device.serving import Model
from device.slots import MAX_TEST_STARTS, NAMES, Slots
from device.spool import Spool
from host.errors import BenchError
from tests.support.agent import PREFIX, REPO_ROOT, Field
from tests.support.broker import Listener, listen, mosquitto
from tests.support.notify import notify_socket
from tests.support.tiny_bundle import LABELS, NEW_LABEL, SPEC, TinyModel, convert_tiny_model, make_frames

PHASES = ("install", "confirm", "revert", "learning")
KILL, LOST = "kill", "lost writes"
CUTS_PER_PHASE = 250
START_EVERY = 20
MAX_RESTART_S = 2.0
PATIENCE_S = 30.0
SOAK_S = 0.2
"""A cut comes up to so long after the phase began, and half of it more."""
DURING_START = 0.1
"""This share of the kills comes while the agent starts and recovers from the one before."""
BOARD = load_board("generic-x86-64")

TABLE = Table(
    name="power_cut",
    command="python -m bench.power_cut",
    seed=0,
    data="a model of 8 x 8 pixels in int8, installed, reverted and taught by the real agent",
    title="Power cuts of the agent",
    notes=lambda rows: _notes(rows),
)


@dataclass(slots=True)
class Tally:
    """What the cuts of one row did."""

    broken: list[str] = field(default_factory=list)
    half_applied: list[str] = field(default_factory=list)
    restarts_s: list[float] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    cuts: int = 0

    def row(self) -> Row:
        for problem in [*self.broken, *self.half_applied]:
            print(f"  {problem}", flush=True)
        states = ", ".join(f"{name} {count}" for name, count in sorted(self.states.items()))
        return {
            "kills": self.cuts,
            "broken": len(self.broken),
            "half_applied": len(self.half_applied),
            "restarts": len(self.restarts_s),
            "worst_restart_s": round(max(self.restarts_s), 3),
            "p50_restart_s": round(median(self.restarts_s), 3),
            "slow_restarts": sum(seconds > MAX_RESTART_S for seconds in self.restarts_s),
            "journal_said": states,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing of the table."""
    return main_of(TABLE, list_jobs, measure, argv, prepare=_require_programs, is_timed=True)


def list_jobs(cuts: int = CUTS_PER_PHASE) -> list[Job]:
    """One job for each kind of cut and phase."""
    parts = ("device", "bench/power_cut.py", "bench/disk_log.py")
    files = [path for part in parts for path in ([REPO_ROOT / part] if part.endswith(".py") else _sources(part))]
    code = digest_code(*files)
    return [
        Job(key={"cut": cut, "phase": phase}, settings={"cuts": cuts}, defined_by=code)
        for cut in (KILL, LOST)
        for phase in PHASES
    ]


def measure(job: Job) -> Row:
    """Cut the power as often as the job says."""
    cut, phase, cuts = job.key["cut"], job.key["phase"], job.settings["cuts"]
    rng = random.Random(f"{TABLE.seed} {cut} {phase}")
    with tempfile.TemporaryDirectory(prefix="power-cut-") as name:
        directory = Path(name)
        bench = Bench.create(directory, convert_tiny_model(directory))
        tally = bench.kill(phase, cuts, rng) if cut == KILL else bench.lose_writes(phase, cuts, rng)
    return tally.row()


@dataclass
class Bench:
    """A board that is cut, and what it is fed with."""

    field: Field
    lessons: list[list[float]]
    release: int = 1
    lesson: int = 0
    bad_frames: int = 0
    said: dict[str, int] = field(default_factory=dict)

    @classmethod
    def create(cls, directory: Path, model: TinyModel) -> "Bench":
        board = Field.create(directory, model)
        board.publish(1)
        if board.cli("update").returncode:
            raise BenchError("the first model could not be installed")
        engine = Engine(board.root / "slots" / "a" / "model.int8.tflite")
        frames = make_frames(40, 4)
        lessons = [[float(x) for x in engine.features(preprocess(frame[None], SPEC))] for frame in frames]
        return cls(board, lessons)

    # cuts by SIGKILL

    def kill(self, phase: str, cuts: int, rng: random.Random) -> Tally:
        tally = Tally()
        with self._broker(phase) as listener:
            for number in range(cuts):
                self._prepare(phase)
                self._kill_once(phase, rng, tally, listener)
                self.field.lose_power()
                tally.cuts += 1
                state = Slots(self.field.root).history()[-1].state
                tally.states[state] += 1
                self._examine(self.field.root, self._said(listener), f"kill {number} ({state})", tally)
        return tally

    @contextmanager
    def _broker(self, phase: str) -> Iterator[Listener | None]:
        runtime = f"telemetry_interval_s = 1000\nsoak_frames = 1000000\nsoak_s = {SOAK_S}\n"
        if phase != "learning":
            self.field.configure(update="check_interval_s = 0.01", runtime=runtime)
            yield None
            return
        with mosquitto(self.field.directory) as port, listen(port, PREFIX) as listener:
            self.field.configure(port=port, runtime=runtime)
            yield listener

    def _prepare(self, phase: str) -> None:
        """There is something to install, unless it is under way from the cut before."""
        entry = Slots(self.field.root).state(self._spare())
        is_under_way = entry.state == "testing" and entry.starts < MAX_TEST_STARTS
        if phase != "learning" and not is_under_way:
            self.release += 1
            self.field.publish(self.release)

    def _spare(self) -> str:
        keep = Slots(self.field.root).fallback()
        return "b" if keep and keep.slot == "a" else "a"

    def _kill_once(self, phase: str, rng: random.Random, tally: Tally, listener: Listener | None) -> None:
        if rng.random() < DURING_START:
            with start_agent(self.field.root, self.field.directory, os.environ):
                time.sleep(rng.uniform(0, 0.8))
            return
        with self._agent() as (agent, restart_s):
            tally.restarts_s.append(restart_s)
            if phase == "install":
                time.sleep(rng.uniform(0, 1.2))
            elif phase == "learning":
                assert listener
                self._teach(listener, until=time.monotonic() + rng.uniform(0.05, 1.0))
            else:
                _wait(lambda: Slots(self.field.root).history()[-1].state == "testing", "the model was not installed")
                end = time.monotonic() + rng.uniform(0, 1.5 * SOAK_S)
                while time.monotonic() < end:
                    if phase == "revert":
                        self._show_bad_frame()
                    time.sleep(min(0.02, max(end - time.monotonic(), 0)))
            agent.send_signal(signal.SIGKILL)
            agent.wait(timeout=PATIENCE_S)

    @contextmanager
    def _agent(self, root: Path | None = None) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
        """A running agent, and the seconds from its start until it said that it serves."""
        with tempfile.TemporaryDirectory(prefix="notify-") as name, notify_socket(Path(name)) as supervisor:
            started = time.monotonic()
            with start_agent(root or self.field.root, self.field.directory, supervisor.environment()) as agent:
                ready = supervisor.wait_for(lambda message: message.get("READY") == "1", PATIENCE_S)
                if "no model" in ready["STATUS"]:
                    raise BenchError(f"the agent serves no model: {ready['STATUS']}")
                yield agent, time.monotonic() - started

    def _teach(self, listener: Listener, *, until: float) -> None:
        while time.monotonic() < until:
            self._send_lesson(listener)
            time.sleep(0.03)

    def _send_lesson(self, listener: Listener) -> None:
        self.lesson += 1
        chosen = [self.lessons[self.lesson % len(self.lessons)], self.lessons[(7 * self.lesson) % len(self.lessons)]]
        arguments = {"label": NEW_LABEL, "features": chosen}
        command = Command(id=f"l{self.lesson}", verb="learn", expires=time.time() + 3600, arguments=arguments)
        listener.send(encode_command(command))

    def _show_bad_frame(self) -> None:
        """A frame with three colours, which the model cannot use."""
        self.bad_frames += 1
        part = self.field.root / "frames" / f"{self.bad_frames:06d}.part"
        part.write_bytes(b"P6 8 8 255\n" + bytes(8 * 8 * 3))
        part.rename(part.with_suffix(".ppm"))
        (self.field.root / "frames" / f"{self.bad_frames - 50:06d}.ppm").unlink(missing_ok=True)

    def _said(self, listener: Listener | None) -> Mapping[str, int]:
        replies = [decode_reply(payload) for payload in (listener.all("reply") if listener else [])]
        return {"version": max((reply.result["version"] for reply in replies if reply.ok), default=0)}

    # cuts that lose writes

    def lose_writes(self, phase: str, cuts: int, rng: random.Random) -> Tally:
        log = self._record(phase)
        tally, window = Tally(), _window(log, phase)
        copy = self.field.directory / "cut" / "root"
        for number in range(cuts):
            count = rng.choice(window)
            files = crash_state(log, count, rng, keep=rng.choice([0.0, 0.5, 0.5, 0.9]))
            shutil.rmtree(copy.parent, ignore_errors=True)
            copy.mkdir(parents=True)
            files.write_to(copy)
            tally.cuts += 1
            entries = Slots(copy).history()
            tally.states[entries[-1].state if entries else "nothing"] += 1
            what = f"lost writes, {phase}, {count} of {len(log.operations)} operations"
            is_well = self._examine(copy, _sent(log, count), what, tally)
            if number % START_EVERY == 0 and is_well:
                self._start(copy, phase, what, tally)
        return tally

    def _record(self, phase: str) -> DiskLog:
        """Let the agent go through a phase under strace."""
        log = self.field.directory / "strace.txt"
        with self._broker(phase) as listener:
            self._prepare(phase)
            before = snapshot(self.field.root)
            with start_agent(self.field.root, self.field.directory, os.environ, trace=log) as tracer:
                if listener:
                    listener.wait_for("state", timeout_s=PATIENCE_S)
                    for _ in range(10):
                        self._send_lesson(listener)
                        listener.wait_for("reply", _answers(f"l{self.lesson}"), PATIENCE_S)
                else:
                    done = "rejected" if phase == "revert" else "confirmed"
                    _wait(lambda: self._is_through(phase, done), f"the model was not {done}")
                agent = int(re.search(r"process (\d+)", (self.field.root / "agent.lock").read_text())[1])
                os.kill(agent, signal.SIGTERM)
                tracer.wait(timeout=PATIENCE_S)
        return read_log(log, self.field.root, before)

    def _is_through(self, phase: str, state: str) -> bool:
        last = Slots(self.field.root).history()[-1]
        if phase == "revert" and last.state == "testing":
            self._show_bad_frame()
        return last.state == state and last.release == self.release

    def _start(self, root: Path, phase: str, what: str, tally: Tally) -> None:
        """A real start on a crash state; the board must also be able to take the release that is offered."""
        try:
            with self._agent(root) as (agent, restart_s):
                tally.restarts_s.append(restart_s)
                if phase != "learning":
                    _wait(lambda: _has_verdict(root, self.release), "the offered release got no verdict")
                agent.send_signal(signal.SIGTERM)
                agent.wait(timeout=PATIENCE_S)
        except (BenchError, TimeoutError) as error:
            tally.broken.append(f"{what}: {error}; {(self.field.directory / 'agent.log').read_text()[-2000:]}")

    # what must hold

    def _examine(self, root: Path, said: Mapping[str, int], what: str, tally: Tally) -> bool:
        """Check what a cut left, on a copy that is recovered as the next start would do it."""
        copy = self.field.directory / "examined" / "root"
        shutil.rmtree(copy.parent, ignore_errors=True)
        skip = shutil.ignore_patterns("frames", "downloads")
        shutil.copytree(root, copy, symlinks=True, ignore=skip)
        broken = _find_broken(copy)
        half = [] if broken else _find_half_applied(copy, said)
        tally.broken += [f"{what}: {problem}" for problem in broken]
        tally.half_applied += [f"{what}: {problem}" for problem in half]
        if broken or half:
            keep = Path(tempfile.gettempdir()) / f"power-cut-{what.replace(' ', '-').replace(',', '')}"
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(root, keep, symlinks=True)
            print(f"  {what}: kept as {keep.name}", flush=True)
        return not broken and not half


def _find_broken(root: Path) -> list[str]:
    """A board needs a confirmed model whose files are whole and whose answers are right, before anything is mended."""
    slots = Slots(root)
    fallback = slots.fallback()
    if fallback is None:
        return ["no confirmed model"]
    problems = []
    for entry in {entry.slot: entry for entry in (fallback, slots.serving()) if entry}.values():
        with _collect(problems, f"slot {entry.slot} ({entry.state})"):
            verify_directory(slots.directory(entry.slot))
            model = Model.load(slots, entry.slot, entry.precision or "int8", BOARD.runtime)
            answer = model.infer(make_frames(1, 2)[0])[1].label
            if answer != LABELS[2]:
                problems.append(f"slot {entry.slot}: answers {answer}")
    return problems


def _find_half_applied(root: Path, said: Mapping[str, int]) -> list[str]:
    problems: list[str] = []
    slots = Slots(root)
    with _collect(problems, "recovery"):
        slots.recover(is_start=True)
    serving, fallback = slots.serving(), slots.fallback()
    assert serving
    assert fallback
    link = os.readlink(root / "current") if (root / "current").is_symlink() else "missing"
    if link != f"slots/{serving.slot}":
        problems.append(f"the link is {link}, slot {serving.slot} serves")
    if serving.state not in ("testing", "confirmed"):
        problems.append(f"slot {serving.slot} serves in state {serving.state}")
    left = {path.name for path in (root / "slots").iterdir()} - set(NAMES)
    problems += [f"slots/{name} is left over" for name in sorted(left)]
    model = Model.load(slots, serving.slot, serving.precision, BOARD.runtime)
    problems += list(model.classifier.problems)
    if model.classifier.head.version < said.get("version", 0):
        problems.append(f"version {said['version']} was learned and answered, {model.classifier.head.version} is there")
    if fallback.release < said.get("release", 0):
        problems.append(f"release {said['release']} was confirmed and reported, {fallback.release} is there")
    return problems + _find_spool_problems(root)


def _find_spool_problems(root: Path) -> list[str]:
    """Open it as the agent does, then look at what is there."""
    path = root / "spool.db"
    Spool(path, max_bytes=BOARD.runtime.spool_bytes, max_age_s=BOARD.runtime.spool_age_s).close()
    if path.with_name("spool.db.damaged").exists():
        return ["spool: damaged, and set aside"]
    with contextlib.closing(sqlite3.connect(path)) as db:
        verdict = db.execute("PRAGMA integrity_check").fetchone()[0]
        depth = db.execute("SELECT count(*) FROM message").fetchone()[0]
        counted = db.execute("SELECT value FROM counter WHERE name = 'depth'").fetchone()[0]
    problems = [] if verdict == "ok" else [f"spool: {verdict}"]
    return problems if depth == counted else [*problems, f"spool: holds {depth} messages, counts {counted}"]


@contextmanager
def _collect(problems: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (DeviceError, OSError) as error:
        problems.append(f"{what}: {error}")


def _has_verdict(root: Path, release: int) -> bool:
    return any(entry.release == release and entry.state in ("confirmed", "rejected") for entry in Slots(root).history())


def _window(log: DiskLog, phase: str) -> Sequence[int]:
    """How many operations may have been done when the power goes in this phase."""
    begin, end = 0, len(log.operations)
    testing = [at for at, line in lines_of(log, "journal.jsonl") if b'"state": "testing"' in line]
    if phase == "install":
        end = testing[0] + 1
    elif phase != "learning":
        begin = testing[0]
    return range(begin, end + 1)


def _sent(log: DiskLog, count: int) -> Mapping[str, int]:
    """What the agent had said by then: the newest lesson it answered, the newest release it called confirmed."""
    text = b"".join(operation.data for operation in log.operations[:count] if isinstance(operation, Sent))
    lessons = re.findall(rb'"ok": ?true.{0,200}?"version": ?(\d+)', text)
    return {"version": max(map(int, lessons), default=0)}


@contextmanager
def start_agent(
    root: Path, directory: Path, environment: Mapping[str, str], *, trace: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the agent, under strace if there is a file for its log; it does not outlive the block."""
    python = os.environ.get("FIELDVIT_DEVICE_PYTHON") or sys.executable
    command = [python, "-m", "device.cli", "run", "--root", str(root)]
    with (directory / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            trace_command(trace, command) if trace else command,
            cwd=REPO_ROOT,
            stdout=log,
            stderr=log,
            env=dict(environment),
            process_group=0,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=PATIENCE_S)


def _answers(command_id: str) -> Callable[[bytes], bool]:
    return lambda payload: decode_reply(payload).id == command_id


def _wait(is_true: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        if time.monotonic() > deadline:
            raise BenchError(complaint)
        time.sleep(0.002)


def _require_programs() -> None:
    if not can_trace():
        raise BenchError("strace is missing or may not trace here; install it, and allow ptrace")
    if shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") is None:
        raise BenchError("mosquitto is not installed; install it (Debian/Ubuntu: apt install mosquitto)")


def _sources(package: str) -> list[Path]:
    return sorted((REPO_ROOT / package).rglob("*.py"))


def _notes(rows: Sequence[Mapping[str, Any]]) -> str:
    cuts = sum(row["kills"] for row in rows)
    broken = sum(row["broken"] for row in rows)
    half = sum(row["half_applied"] for row in rows)
    worst = max((row["worst_restart_s"] for row in rows), default=0.0)
    return f"""\
Together {cuts} cuts: {broken} boards without a working confirmed model, {half} states that were half applied, the slowest
start {worst:.2f} s until it served. `journal_said` counts the state of the journal's last line when the power went.

`lost writes` is a model of the disk (`bench.disk_log` says what is in it and what is not), applied to what strace recorded of
the real agent, SQLite's own writes included. Its restarts are those of every {START_EVERY}th crash state."""


if __name__ == "__main__":
    sys.exit(main())
