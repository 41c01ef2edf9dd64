"""A board to measure the agent on: its data directory, an update repository, frames that never run out, processes.

The processes run on the board's environment and are favoured by the scheduler where this user may do so: a shared machine
should not decide what is measured.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.moments import Moments
from bench.random_bundles import RandomModel, make_frames
from device.classifier import read_base_head
from device.contract.bundle import extract
from host.errors import BenchError
from host.fleet.repository import UpdateRepository
from tests.support.agent import DEVICE_PYTHON, REPO_ROOT

FAVOUR = -10
DISTINCT_FRAMES = 64
AHEAD_S, MIN_AHEAD, MAX_AHEAD = 2.0, 100, 10_000
FEED_S = 0.1
THREADS = 1


@dataclass
class Setting:
    """One board, served with the releases of two models in turn."""

    directory: Path
    models: Sequence[RandomModel]
    repository: UpdateRepository
    release: int = 0

    @classmethod
    def create(cls, directory: Path, models: Sequence[RandomModel]) -> "Setting":
        """Make it and install the first release."""
        repository = UpdateRepository.open_or_create(directory / "repo", directory / "keys")
        setting = cls(directory, models, repository)
        setting.root.mkdir()
        (setting.root / "root.json").write_bytes(repository.root_bytes)
        (setting.root / "frames").mkdir()
        setting.configure()
        setting.publish()
        log = directory / "install.log"
        if _start(["-m", "device.cli", "update", "--root", setting.root], log).wait():
            raise BenchError(f"the first release was not installed: {log.read_text().strip().splitlines()[-1]}")
        return setting

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def frames(self) -> Path:
        return self.root / "frames"

    def configure(self, *, broker_port: int = 0, source: str = "") -> None:
        """Write `agent.toml`; all but the addresses is what a board has by default."""
        broker = f'[broker]\nhostname = "127.0.0.1"\nport = {broker_port}\n' if broker_port else ""
        (self.root / "agent.toml").write_text(
            f'site = "lab"\ndevice = "cam-1"\nboard = "generic-x86-64"\n{broker}'
            f'[update]\nsource = "{source or f"dir:{self.directory}/repo"}"\n[runtime]\nthreads = {THREADS}\n'
        )

    def publish(self) -> int:
        """Sign the next release, of the other model; returns its number."""
        self.release += 1
        model = self.models[self.release % len(self.models)]
        bundle = model.write(self.directory, self.release)
        self.repository.publish(bundle, "stable")
        bundle.unlink()
        self.repository.prune(keep=2)
        return self.release

    @contextmanager
    def agent(self, moments: Path, *, program: str = "bench.timed_agent") -> Iterator[subprocess.Popen]:
        """Run the agent; `program` is the module that starts it."""
        with favoured(["-m", program, moments, self.root], self.directory / "agent.log") as process:
            yield process

    @contextmanager
    def bare_loop(self, moments: Path) -> Iterator[subprocess.Popen]:
        """Run the bare loop on the model that the first release brought."""
        parts = self.directory / "bare"
        if not parts.exists():
            self._write_bare(parts)
        words = [
            moments,
            self.frames,
            parts / "model.int8.tflite",
            parts / "manifest.json",
            parts / "linear.npz",
            THREADS,
        ]
        with favoured(["-m", "bench.bare_loop", *words], self.directory / "bare.log") as process:
            yield process

    def _write_bare(self, parts: Path) -> None:
        bundle = self.models[1 % len(self.models)].write(self.directory, 1)
        manifest = extract(bundle, parts)
        weight, bias = read_base_head(parts, manifest, manifest.artifacts[0]).learner.linear()
        np.savez(parts / "linear.npz", weight=weight, bias=bias)
        bundle.unlink()

    def status(self) -> dict:
        """What the agent wrote last about itself."""
        return json.loads((self.root / "agent.json").read_bytes())


@contextmanager
def favoured(words: Sequence[object], log_path: Path) -> Iterator[subprocess.Popen]:
    """Run a program of the board's interpreter, ahead of the machine's other work; it is stopped at the end."""
    process = _start(words, log_path)
    try:
        yield process
    finally:
        end(process, log_path)


def _start(words: Sequence[object], log_path: Path) -> subprocess.Popen:
    python = os.environ.get("FIELDVIT_DEVICE_PYTHON", str(DEVICE_PYTHON))
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [python, *map(str, words)],
            cwd=REPO_ROOT,
            env=_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    with suppress(PermissionError, FileNotFoundError):  # only root may, and not every kernel groups by session
        os.setpriority(os.PRIO_PROCESS, process.pid, FAVOUR)
        Path(f"/proc/{process.pid}/autogroup").write_text(str(FAVOUR))
    return process


def _environment() -> dict[str, str]:
    """A board's: its modules lie there compiled, and one thread is one thread."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"OPENBLAS_NUM_THREADS": str(THREADS)}  # as the agent sets it


def end(process: subprocess.Popen, log_path: Path) -> None:
    """Stop it in good order; BenchError if it had ended by itself."""
    if process.poll() is not None:
        lines = log_path.read_text(errors="replace").strip().splitlines()[-5:]
        raise BenchError(f"{log_path.name}: ended by itself with {process.returncode}: {' / '.join(lines)}")
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise BenchError(f"{log_path.name}: did not stop within 30 s of SIGTERM") from None


def frame_id(number: int) -> str:
    """Of the frame that the feeder gave as this one; from 0, over all runs."""
    return f"{number:012d}"


class Feeder:
    """Keeps some seconds of frames in a directory, as hard links to a few photos, and takes away what was read."""

    def __init__(self, frames: Path, model: RandomModel) -> None:
        self._frames = frames
        store = frames.parent.parent / "photos"
        store.mkdir(exist_ok=True)
        self._photos = [store / f"{number}.npy" for number in range(DISTINCT_FRAMES)]
        for path, pixels in zip(self._photos, make_frames(model.spec, DISTINCT_FRAMES), strict=True):
            np.save(path, pixels)
        self._given = 0

    @contextmanager
    def feed(self, moments: Moments) -> Iterator[None]:
        """Feed the process that writes these moments, from an empty directory on."""
        for path in self._frames.iterdir():
            path.unlink()
        stop = threading.Event()
        first = self._given
        self._give(MIN_AHEAD)
        thread = threading.Thread(target=self._run, args=(moments, first, stop), name="feeder")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _run(self, moments: Moments, first: int, stop: threading.Event) -> None:
        removed, before, since = first, 0, time.monotonic()
        while not stop.wait(FEED_S):
            count, now = moments.count, time.monotonic()
            rate, before, since = (count - before) / (now - since), count, now
            ahead = min(max(int(AHEAD_S * rate), MIN_AHEAD), MAX_AHEAD)
            self._give(first + count + ahead - self._given)
            for number in range(removed, first + count):
                (self._frames / self._name(number)).unlink()
            removed = max(removed, first + count)

    def _give(self, count: int) -> None:
        for number in range(self._given, self._given + count):
            os.link(self._photos[number % DISTINCT_FRAMES], self._frames / self._name(number))
        self._given += max(count, 0)

    @staticmethod
    def _name(number: int) -> str:
        return f"{frame_id(number)}.npy"


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen, timeout_s: float, what: str) -> None:
    """Wait until something is so.

    Raises:
        BenchError: the process ended, or it took too long.
    """
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if process.poll() is not None:
            raise BenchError(f"the process ended with {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise BenchError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.005)


def memory_of(pid: int) -> dict[str, float]:
    """Resident (`Rss`) and proportional (`Pss`) memory of a process, MB, from the kernel's own sums."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
    return {name: found[name] for name in ("Rss", "Pss", "Private_Dirty")}


def cpu_seconds(pid: int) -> float:
    """Processor time that a process took, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
