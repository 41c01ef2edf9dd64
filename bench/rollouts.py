"""Releases, good and bad, to a simulated fleet by way of stages, while the monitor that carries the rollout on is killed.

    python -m bench.rollouts [--only PART_OF_A_LABEL]

A real mosquitto, the real monitor with its store on disk, and `fieldvit simulate` with that many boards, which follow an
update repository; release 2 lies in a channel that they do not follow. The monitor's process is killed again and again
(SIGKILL) and started anew; nobody else does anything.

- `told`: boards that were told to take release 2, `took`: those that served it at any moment;
- `new`, `old`: boards that serve release 2 and release 1 when it is over, as they said last;
- `commands_per_board`: the most that one board got; `by_hand`: what a person did.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.jobs import Job, Table, main_of
from bench.record import Row
from bench.sources import digest_of
from host.errors import BenchError
from host.fleet.repository import UpdateRepository
from host.monitor.rollout.engine import is_over
from host.monitor.rollout.journal import Journal
from host.monitor.rollout.plan import Limits, Plan, parse_stages
from host.monitor.store import open_store
from tests.support.broker import mosquitto
from tests.support.tiny_bundle import convert_tiny_model, write_bundle

DEVICES = 1000
STAGES = "1,10%,50%,100%"
RATE_S = 5.0
SOAK_S = 20.0
KILL_EVERY_S = (10.0, 30.0)
TIMEOUT_S = 1500.0
OLD, NEW = 1, 2
SCENARIOS = {
    "good": "",
    "refused by its self-test": "bad-model=1:2:selftest",
    "rolled back on probation": "bad-model=1:2:probation",
    "slow once confirmed": "bad-model=1:2:latency",
    "frames fail once confirmed": "bad-model=1:2:errors",
    "drifts once confirmed": "bad-model=1:2:drift",
    "slow on one board of five": "bad-model=0.2:2:latency",
}
CODE = (
    "bench.rollouts",
    "host.monitor.rollout.engine",
    "host.monitor.rollout.decide",
    "host.monitor.rollout.sight",
    "host.simulate.run",
)
ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing of the table."""
    table = Table(
        name="rollouts",
        command="python -m bench.rollouts",
        seed=0,
        data="simulated boards; bundles of a tiny model",
        title="Rollouts to a simulated fleet",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv)


def list_jobs() -> list[Job]:
    """One for each scenario."""
    settings = {"devices": DEVICES, "stages": STAGES, "rate_s": RATE_S, "soak_s": SOAK_S, "seed": 0}
    code = digest_of(*CODE)
    return [Job(key={"release": name}, settings=settings, defined_by=code) for name in SCENARIOS]


def measure(job: Job) -> Row:
    """One rollout, from its beginning until nothing can come any more."""
    settings = dict(job.settings)
    with tempfile.TemporaryDirectory(prefix="rollouts-") as directory:
        return run(Path(directory), SCENARIOS[str(job.key["release"])], **settings)


def run(directory: Path, fault: str, *, devices: int, stages: str, rate_s: float, soak_s: float, seed: int) -> Row:
    """Roll release 2 out to a fleet on which `fault` makes it bad."""
    repository = _repository(directory)
    with (
        mosquitto(directory) as port,
        Fleet.started(directory, port, repository) as fleet,
        fleet.simulation(devices, rate_s, fault, seed),
    ):
        fleet.wait(lambda: fleet.serving()[OLD] == devices, "the boards' births")
        plan = Plan(
            id="bench",
            channel="canary",
            name="tiny",
            version="2.0.0",
            release=NEW,
            created=time.time(),
            stages=parse_stages(stages),
            limits=Limits(soak_s=soak_s, patience_s=600.0),
        )
        Journal.create(fleet.rollouts, plan)
        began, chance = time.monotonic(), random.Random(seed)
        kills = fleet.carry_on(chance)
        seconds = time.monotonic() - began
        fleet.wait(lambda: sum(fleet.serving().values()) == devices, "the boards' last words")
        return fleet.row() | {"devices": devices, "kills": kills, "seconds": round(seconds, 1)}


def _repository(directory: Path) -> Path:
    model = convert_tiny_model(directory)
    repository = UpdateRepository.open_or_create(directory / "repo", directory / "keys")
    for release, channel in ((OLD, "stable"), (NEW, "canary")):
        repository.publish(write_bundle(directory, model, release=release), channel)
    return directory / "repo"


@dataclass
class Fleet:
    """A monitor that dies and is started again, and boards that go on."""

    directory: Path
    port: int
    repository: Path
    monitor: subprocess.Popen[bytes]

    @classmethod
    @contextmanager
    def started(cls, directory: Path, port: int, repository: Path) -> Iterator["Fleet"]:
        fleet = cls(directory, port, repository, _start_monitor(directory, port))
        try:
            yield fleet
        finally:
            fleet.monitor.kill()
            fleet.monitor.wait()

    @property
    def rollouts(self) -> Path:
        return self.directory / "rollouts"

    @contextmanager
    def simulation(self, devices: int, rate_s: float, fault: str, seed: int) -> Iterator[None]:
        words = ["simulate", "--devices", devices, "--broker", f"127.0.0.1:{self.port}", "--rate", rate_s]
        words += ["--seed", seed, "--updates", self.repository, *(["--faults", fault] if fault else [])]
        process = _start(self.directory, "simulate", words)
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def carry_on(self, chance: random.Random) -> int:
        """Kill the monitor now and then until the rollout is over; returns how often."""
        kills, deadline = 0, time.monotonic() + TIMEOUT_S
        next_kill = time.monotonic() + chance.uniform(*KILL_EVERY_S)
        while not is_over(Journal(self.rollouts / "bench").progress, now=time.time()):
            if time.monotonic() > deadline:
                raise BenchError(f"the rollout is not over after {TIMEOUT_S:g} s: {self.row()}")
            if time.monotonic() > next_kill:
                self.monitor.kill()
                self.monitor.wait()
                self.monitor = _start_monitor(self.directory, self.port)
                kills, next_kill = kills + 1, time.monotonic() + chance.uniform(*KILL_EVERY_S)
            time.sleep(0.5)
        return kills

    def serving(self) -> Counter[int]:
        """How many boards serve each release, as they said last."""
        with closing(open_store(self.directory / "store.sqlite")) as store:
            states = [row.state for row in store.devices()]
        return Counter(state.model.release for state in states if state and state.model)

    def row(self) -> dict[str, Any]:
        journal = Journal(self.rollouts / "bench")
        entries, serving = journal.entries(), self.serving()
        orders = Counter(entry.device for entry in entries if entry.kind in ("asked", "revert"))
        return {
            "status": journal.progress.status,
            "told": len({entry.device for entry in entries if entry.kind == "asked"}),
            "took": self._took(),
            "new": serving[NEW],
            "old": serving[OLD],
            "commands_per_board": max(orders.values(), default=0),
            "by_hand": sum(bool(entry.by) for entry in entries if entry.kind != "started"),
        }

    def _took(self) -> int:
        with closing(open_store(self.directory / "store.sqlite")) as store:
            events = store.events_since(0.0)
        found = {device for device, row in events if row.event.kind == "installed" and row.event.data["release"] == NEW}
        return len(found)

    def wait(self, is_true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_true():
            if time.monotonic() > deadline:
                raise BenchError(f"{what} did not come within {TIMEOUT_S:g} s: {self.row()}")
            time.sleep(1.0)


def _start_monitor(directory: Path, port: int) -> subprocess.Popen[bytes]:
    ready = directory / "ready.json"
    ready.unlink(missing_ok=True)
    words = ["monitor", "--store", directory / "store.sqlite", "--broker", f"mqtt://127.0.0.1:{port}", "--port", 0]
    process = _start(directory, "monitor", [*words, "--rollouts", directory / "rollouts", "--ready-file", ready])
    deadline = time.monotonic() + 60
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the monitor did not start; see {directory / 'monitor.log'}")
        time.sleep(0.05)
    json.loads(ready.read_text())
    return process


def _start(directory: Path, name: str, words: Sequence[object]) -> subprocess.Popen[bytes]:
    with (directory / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "host.cli", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _notes(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if row["release"] not in ("good", "slow on one board of five")]
    alone = sum(row["took"] <= 1 and row["told"] == 1 for row in bad)
    back = sum(row["new"] == 0 for row in rows if row["status"] == "aborted")
    return (
        f"{alone} of {len(bad)} releases that are bad everywhere were told to the canary alone; "
        f"{back} of {sum(row['status'] == 'aborted' for row in rows)} aborted rollouts left no board on the release."
    )


if __name__ == "__main__":
    sys.exit(main())
