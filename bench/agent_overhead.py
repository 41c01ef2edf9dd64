"""What the agent costs above a bare interpreter loop, and how evenly it classifies while it updates or reconnects.

    python -m bench.agent_overhead [--only PART_OF_A_LABEL]

The agent is the real one in a process of its own, with a real mosquitto and the board profile's telemetry; the bare loop
(`bench.bare_loop`) has the same interpreter, artifact, threads, decoding and pre-processing. Both read the same photos
from a directory that is filled as they go.

- *steady*: agent and bare loop run in turn, each from a new start; ratios are those of neighbours, their median counts.
- *update*: again and again the other of two models comes over HTTP, is verified, tested in a child on the same cores,
  serves on probation and is confirmed. All frames from the request to the confirmation count.
- *reconnect*: the broker goes and comes back. All frames from its end until the agent is connected again count.

`p99_over_p50` is of a frame's latency, pre-processing to answer, in the disturbed stretches; `calm_p99_over_p50` that of
as long stretches between them; `disturbance` is their quotient. The same of the time from one frame's end to the next
one's is `period_...`: it holds everything that the frame loop does beside, golden frames included.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from bench.agent_setting import Feeder, Setting, cpu_seconds, memory_of, wait_until
from bench.install_sizes import device_packages
from bench.jobs import Job, Table, main_of
from bench.moments import Moments
from bench.random_bundles import RandomModel, make_model
from bench.record import Row
from bench.sources import digest_of
from host.errors import BenchError
from host.monitor.broker import find_mosquitto
from tests.support.agent import PREFIX
from tests.support.broker import listen, mosquitto
from tests.support.web import serve

MODELS = ("efficientformer/l1", "efficientformer/field-32")
STEADY, UPDATE, RECONNECT, INSTALLED = "steady", "update", "reconnect", "installed"
SETTINGS = {
    STEADY: {"pairs": 7, "seconds": 10.0},
    UPDATE: {"cycles": 10, "calm_s": 6.0},
    RECONNECT: {"cycles": 10, "calm_s": 6.0},
}
WARM_UP_S = 1.0
START_TIMEOUT_S, EVENT_TIMEOUT_S = 60.0, 180.0
LOOK_S = 0.05
AWAY_S = 5.0
"""Longer than the agent's telemetry interval, so that it has written down that it is alone."""
MEASURED = ("bench.agent_overhead", "bench.timed_agent", "bench.bare_loop", "device.app")
CONVERSIONS = "FIELDVIT_BENCH_MODELS"
"""Environment variable: a folder that keeps conversions from one run to the next."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing of the table."""
    table = Table(
        name="agent_overhead",
        command="python -m bench.agent_overhead",
        seed=0,
        data="64 crops of two photographs; models with random weights in int8, by our converters",
        title="What the agent costs above a bare interpreter loop",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv, prepare=require_mosquitto, is_timed=True)


def list_jobs(settings: dict[str, dict[str, float]] = SETTINGS) -> list[Job]:
    """Three jobs for each model, and the size of what is installed."""
    code = digest_of(*MEASURED)
    jobs = [
        Job(key={"model": model, "measured": phase}, settings=settings[phase], defined_by=code)
        for model in MODELS
        for phase in (STEADY, UPDATE, RECONNECT)
    ]
    return [*jobs, Job(key={"model": None, "measured": INSTALLED}, defined_by=digest_of("bench.install_sizes"))]


def measure(job: Job) -> Row:
    """One row."""
    if job.key["measured"] == INSTALLED:
        sizes = device_packages()
        return {"installed_mb": round(sum(sizes.values()) / 1e6, 1), "packages": _listed(sizes)}
    phase = {STEADY: _steady, UPDATE: _updates, RECONNECT: _reconnects}[str(job.key["measured"])]
    with tempfile.TemporaryDirectory(prefix="overhead-") as directory:
        return phase(Bench.create(Path(directory), str(job.key["model"])), **job.settings)


def require_mosquitto() -> None:
    if find_mosquitto() is None:
        raise BenchError("mosquitto is not installed; install it (apt install mosquitto)")


@dataclass
class Bench:
    """A setting with what feeds it."""

    setting: Setting
    feeder: Feeder
    runs: int = 0

    @classmethod
    def create(cls, directory: Path, model: str) -> "Bench":
        models = random_models(model)
        setting = Setting.create(directory, models)
        return cls(setting, Feeder(setting.frames, models[0]))

    @contextmanager
    def moments(self) -> Iterator[Moments]:
        """Empty ones, in `moments_path`, and frames as they fill."""
        self.runs += 1
        moments = Moments.create(self.moments_path)
        with self.feeder.feed(moments):
            yield moments

    @property
    def moments_path(self) -> Path:
        return self.setting.directory / f"moments-{self.runs}"


@cache
def random_models(model: str) -> tuple[RandomModel, RandomModel]:
    """Two of the same architecture, converted once."""
    with ExitStack() as stack:
        kept = os.environ.get(CONVERSIONS) or stack.enter_context(tempfile.TemporaryDirectory())
        first, second = (make_model(model, seed=seed, directory=Path(kept)) for seed in (0, 1))
    return first, second


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the agent, or of the bare loop."""

    frames_per_s: float
    cpu_ms: float
    start_s: float
    rss_mb: float
    pss_mb: float


Start = Callable[[Path], AbstractContextManager[subprocess.Popen]]


def _steady(bench: Bench, *, pairs: float, seconds: float) -> Row:
    agents: list[Run] = []
    bares: list[Run] = []
    with _broker(bench.setting) as broker:
        bench.setting.configure(broker_port=broker.port)
        for number in range(int(pairs)):
            kinds = [(bench.setting.agent, agents), (bench.setting.bare_loop, bares)]
            for start, runs in kinds if number % 2 else reversed(kinds):
                runs.append(_run(bench, start, seconds))
    ratios = [a.frames_per_s / b.frames_per_s for a, b in zip(agents, bares, strict=True)]
    starts = [a.start_s / b.start_s for a, b in zip(agents, bares, strict=True)]
    return {
        "throughput_ratio": round(median(ratios), 4),
        "throughput_ratio_lowest": round(min(ratios), 4),
        "throughput_ratio_highest": round(max(ratios), 4),
        "agent_fps": round(_median(agents, "frames_per_s"), 2),
        "bare_fps": round(_median(bares, "frames_per_s"), 2),
        "agent_cpu_ms": round(_median(agents, "cpu_ms"), 3),
        "bare_cpu_ms": round(_median(bares, "cpu_ms"), 3),
        "extra_rss_mb": round(_median(agents, "rss_mb") - _median(bares, "rss_mb"), 1),
        "agent_rss_mb": round(_median(agents, "rss_mb"), 1),
        "bare_rss_mb": round(_median(bares, "rss_mb"), 1),
        "extra_pss_mb": round(_median(agents, "pss_mb") - _median(bares, "pss_mb"), 1),
        "start_ratio": round(median(starts), 3),
        "agent_start_s": round(_median(agents, "start_s"), 3),
        "bare_start_s": round(_median(bares, "start_s"), 3),
    }


def _run(bench: Bench, start: Start, seconds: float) -> Run:
    """Start a process, let it classify for so long, and stop it."""
    with bench.moments() as moments:
        began = time.monotonic()
        with start(bench.moments_path) as process:
            wait_until(lambda: moments.count > 0, process, START_TIMEOUT_S, "the first frame")
            first_frame = moments.since(0)[0][1]
            time.sleep(WARM_UP_S)
            first, cpu = moments.count, cpu_seconds(process.pid)
            frames = _frames_until(moments, _after(seconds))
            cpu = cpu_seconds(process.pid) - cpu
            memory = memory_of(process.pid)
    return Run(
        frames_per_s=(len(frames) - 1) / (frames[-1][1] - frames[0][1]),
        cpu_ms=1e3 * cpu / (moments.count - first),
        start_s=first_frame - began,
        rss_mb=memory["Rss"],
        pss_mb=memory["Pss"],
    )


Frames = list[tuple[float, float]]
"""When each began and ended, seconds."""


def _frames_until(moments: Moments, is_over: Callable[[], bool], timeout_s: float = EVENT_TIMEOUT_S) -> Frames:
    """The frames from now on until something is so."""
    frames: Frames = []
    number, deadline = moments.count, time.monotonic() + timeout_s
    while not is_over():
        if time.monotonic() > deadline:
            raise BenchError(f"what was waited for did not happen within {timeout_s:.0f} s; look at the agent's log")
        time.sleep(LOOK_S)
        part = moments.since(number)
        number += len(part)
        frames += part
    return frames


def _after(seconds: float) -> Callable[[], bool]:
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() > moment


def _updates(bench: Bench, *, cycles: float, calm_s: float) -> Row:
    setting = bench.setting

    def disturb(process: subprocess.Popen) -> Callable[[], bool]:
        release = setting.publish()
        process.send_signal(signal.SIGHUP)
        return lambda: [setting.status()[name] for name in ("state", "release")] == ["confirmed", release]

    with _broker(setting) as broker, serve(setting.directory / "repo") as site:
        setting.configure(broker_port=broker.port, source=site.url)
        return _disturbed(bench, disturb, int(cycles), calm_s)


def _reconnects(bench: Bench, *, cycles: float, calm_s: float) -> Row:
    setting = bench.setting

    def disturb(_: subprocess.Popen) -> Callable[[], bool]:
        broker.stop()
        is_due = _after(AWAY_S)

        def is_over() -> bool:
            if not broker.is_running and is_due():
                broker.start()
            return broker.is_running and bool(setting.status()["connected"])

        return is_over

    with _broker(setting) as broker:
        setting.configure(broker_port=broker.port)
        return _disturbed(bench, disturb, int(cycles), calm_s)


def _disturbed(
    bench: Bench, disturb: Callable[[subprocess.Popen], Callable[[], bool]], cycles: int, calm_s: float
) -> Row:
    """Disturb the agent again and again; `disturb` begins and says how to see that it is over."""
    calm: list[Frames] = []
    disturbed: list[Frames] = []
    with bench.moments() as moments, bench.setting.agent(bench.moments_path) as process:
        wait_until(lambda: moments.count > 0, process, START_TIMEOUT_S, "the first frame")
        _frames_until(moments, _after(WARM_UP_S))
        for _ in range(cycles):
            calm.append(_frames_until(moments, _after(calm_s)))
            disturbed.append(_frames_until(moments, disturb(process)))
    latency, calm_latency = _spread(disturbed, _latencies), _spread(calm, _latencies)
    period, calm_period = _spread(disturbed, _periods), _spread(calm, _periods)
    return {
        "p99_over_p50": round(latency, 3),
        "calm_p99_over_p50": round(calm_latency, 3),
        "disturbance": round(latency / calm_latency, 3),
        "period_p99_over_p50": round(period, 3),
        "calm_period_p99_over_p50": round(calm_period, 3),
        "period_disturbance": round(period / calm_period, 3),
        "longest_period_ms": round(1e3 * max(_pooled(disturbed, _periods)), 1),
        "calm_longest_period_ms": round(1e3 * max(_pooled(calm, _periods)), 1),
        "frames": sum(map(len, disturbed)),
        "seconds_each": round(median(frames[-1][1] - frames[0][0] for frames in disturbed), 2),
    }


def _spread(stretches: Sequence[Frames], times: Callable[[Frames], list[float]]) -> float:
    p50, p99 = np.percentile(_pooled(stretches, times), [50, 99])
    return float(p99 / p50)


def _pooled(stretches: Sequence[Frames], times: Callable[[Frames], list[float]]) -> list[float]:
    return [value for frames in stretches for value in times(frames)]


def _latencies(frames: Frames) -> list[float]:
    return [ended - began for began, ended in frames]


def _periods(frames: Frames) -> list[float]:
    return [after[1] - before[1] for before, after in pairwise(frames)]


@dataclass
class _Broker:
    """A mosquitto that can be ended and started again."""

    directory: Path
    port: int
    _running: ExitStack

    is_running: bool = True

    def stop(self) -> None:
        self._running.close()
        self.is_running = False

    def start(self) -> None:
        self._running.enter_context(mosquitto(self.directory, self.port))
        self.is_running = True


@contextmanager
def _broker(setting: Setting) -> Iterator[_Broker]:
    directory = setting.directory / "broker"
    directory.mkdir()
    with ExitStack() as running:
        port = running.enter_context(mosquitto(directory))
        with listen(port, PREFIX, "monitor"):
            yield _Broker(directory, port, running)


def _median(runs: Sequence[Run], name: str) -> float:
    return median(getattr(run, name) for run in runs)


def _listed(sizes: Mapping[str, int]) -> str:
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / 1e6:.1f}" for name, size in ordered if size >= 50_000)


def _notes(rows: Sequence[Row]) -> str:
    return (
        "Bars: `throughput_ratio` at least 0.97, `extra_rss_mb` at most 25, `start_ratio` at most 1.5, `installed_mb` at "
        "most 170, `disturbance` at most 1.3, for a model as slow as EfficientFormer-L1 or slower. `agent_cpu_ms` and "
        "`bare_cpu_ms` are processor time per frame, all threads: other work on the machine changes them least. RSS is "
        "resident memory, of which libraries are a part that processes share; PSS counts a shared page in parts. "
        "`start` is from the start of the process to the first answer. Installed size is that of the device "
        "environment's packages without pip and setuptools, in MB."
    )


if __name__ == "__main__":
    sys.exit(main())
