"""Does the agent's memory grow, or what it holds open, over hours of frames, updates and lessons?

    python -m bench.soak [--minutes 60] [--only PART_OF_A_NAME]

The real agent classifies at its full rate while, again and again, the other of two models is installed over HTTP, a class is
taught and taken back, and the broker goes and comes back. Every ten seconds its memory, open descriptors, threads and spool
are looked at. The slope is Theil and Sen's, the median over all pairs of samples, with the 95 % interval by Kendall's
tau, after a warm-up. A board's own tools would say the same: all figures are the kernel's.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.agent_overhead import Bench, require_mosquitto
from bench.agent_setting import DISTINCT_FRAMES, frame_id, memory_of, wait_until
from bench.jobs import Job, Table, main_of
from bench.moments import Moments
from bench.record import Row
from bench.sources import digest_of
from device.contract.messages import Command, decode_reply, encode_command
from host.errors import BenchError
from tests.support.agent import PREFIX
from tests.support.broker import Listener, listen, mosquitto
from tests.support.web import serve

MODELS = ("efficientformer/l1", "efficientformer/field-32")
MINUTES = 60.0
SAMPLE_S, WARM_UP_SHARE = 10.0, 0.2
UPDATE_S, LESSON_S, BROKER_S = 120.0, 20.0, 300.0
EXAMPLES = 4
START_TIMEOUT_S, REPLY_TIMEOUT_S, CONNECT_TIMEOUT_S, UPDATE_TIMEOUT_S = 60.0, 60.0, 120.0, 180.0
MAX_SLOPE_MB_PER_H = 3.0
"""What may be left of the slope's interval above zero: a leak that a board with 512 MB free bears for a week."""
SMOOTH = 1.959964

TABLE = Table(
    name="soak",
    command="python -m bench.soak",
    seed=0,
    data="crops of two photographs; models with random weights in int8, by our converters",
    title="The agent over an hour of frames, updates and lessons",
    notes=lambda rows: _notes(),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at the process."""

    seconds: float
    rss_mb: float
    pss_mb: float
    descriptors: int
    threads: int
    spool_mb: float
    frames: int


@dataclass(frozen=True, slots=True)
class Slope:
    """Per unit of x, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass
class Tally:
    """What happened meanwhile."""

    updates: int = 0
    lessons: int = 0
    undone: int = 0
    broker_restarts: int = 0
    refused: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing of the table."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    options, rest = parser.parse_known_args(argv)
    return main_of(TABLE, lambda: list_jobs(options.minutes), measure, rest, prepare=require_mosquitto, is_timed=True)


def list_jobs(minutes: float = MINUTES) -> list[Job]:
    """One job for each model."""
    code = digest_of("bench.soak", "bench.timed_agent", "device.app")
    return [Job(key={"model": model}, settings={"minutes": minutes}, defined_by=code) for model in MODELS]


def measure(job: Job) -> Row:
    """Run the agent for so long."""
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        bench = Bench.create(Path(directory), str(job.key["model"]))
        samples, tally = soak(bench, 60 * float(job.settings["minutes"]))
    for reason in tally.refused:
        print(f"  {reason}", file=sys.stderr)
    return row_of(samples, tally)


def soak(
    bench: Bench, seconds: float, *, sample_s: float = SAMPLE_S, pace: float = 1.0, program: str = "bench.timed_agent"
) -> tuple[list[Sample], Tally]:
    """Trouble the agent for so long.

    Args:
        bench: a board.
        seconds: from the first frame on.
        sample_s: between two looks.
        pace: how much faster than published updates, lessons and restarts follow.
        program: the module that starts the agent.
    """
    directory, tally = bench.setting.directory / "broker", Tally()
    directory.mkdir()
    with ExitStack() as stack:
        broker = stack.enter_context(ExitStack())
        port = broker.enter_context(mosquitto(directory))
        monitor = stack.enter_context(listen(port, PREFIX, "monitor"))  # it comes back when the broker does
        site = stack.enter_context(serve(bench.setting.directory / "repo"))
        bench.setting.configure(broker_port=port, source=site.url)
        moments = stack.enter_context(bench.moments())
        process = stack.enter_context(bench.setting.agent(bench.moments_path, program=program))
        wait_until(lambda: moments.count > 0, process, START_TIMEOUT_S, "the first frame")
        stop, samples = threading.Event(), []
        sampler = threading.Thread(
            target=_sample, args=(process, bench.setting.root, moments, sample_s, stop, samples), name="sampler"
        )
        sampler.start()
        try:
            _trouble(bench, process, moments, broker, monitor, port, seconds, pace, tally)
        finally:
            stop.set()
            sampler.join()
    return samples, tally


def _sample(
    process: subprocess.Popen, root: Path, moments: Moments, every_s: float, stop: threading.Event, found: list[Sample]
) -> None:
    began = time.monotonic()
    while not stop.wait(every_s) and process.poll() is None:
        memory = memory_of(process.pid)
        found.append(
            Sample(
                seconds=time.monotonic() - began,
                rss_mb=memory["Rss"],
                pss_mb=memory["Pss"],
                descriptors=len(os.listdir(f"/proc/{process.pid}/fd")),
                threads=len(os.listdir(f"/proc/{process.pid}/task")),
                spool_mb=sum(path.stat().st_size for path in root.glob("spool.db*")) / 1e6,
                frames=moments.count,
            )
        )


def _trouble(
    bench: Bench,
    process: subprocess.Popen,
    moments: Moments,
    broker: ExitStack,
    monitor: Listener,
    port: int,
    seconds: float,
    pace: float,
    tally: Tally,
) -> None:
    """Update, teach and restart the broker by the clock, one after the other."""
    setting = bench.setting

    def update() -> None:
        release = setting.publish()
        process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: [setting.status()[name] for name in ("state", "release")] == ["confirmed", release],
            process,
            UPDATE_TIMEOUT_S,
            f"release {release} was confirmed",
        )
        tally.updates += 1

    def restart() -> None:
        broker.close()
        time.sleep(1)
        broker.enter_context(mosquitto(setting.directory / "broker", port))
        tally.broker_restarts += 1

    def are_connected() -> bool:
        return bool(monitor.client.is_connected() and setting.status()["connected"])

    def lesson() -> None:
        wait_until(are_connected, process, CONNECT_TIMEOUT_S, "agent and monitor were connected")
        taught = _ask(monitor, "learn", {"frame_ids": _same_photo(moments.count - 1), "label": "taught"})
        tally.lessons += taught is None
        undone = _ask(monitor, "undo", {}) if taught is None else taught
        tally.undone += undone is None
        tally.refused += [reason for reason in (taught, undone) if reason][:1]

    until = time.monotonic() + seconds
    due = {name: time.monotonic() + wait_s / pace / 2 for name, wait_s in _EVERY_S.items()}
    actions: Mapping[str, Callable[[], None]] = {"lesson": lesson, "update": update, "broker": restart}
    while time.monotonic() < until:
        if process.poll() is not None:
            raise BenchError(f"the agent ended with {process.returncode}")
        name = min(due, key=lambda key: due[key])
        if due[name] > time.monotonic():
            time.sleep(min(0.2, due[name] - time.monotonic()))
            continue
        actions[name]()
        due[name] = max(due[name] + _EVERY_S[name] / pace, time.monotonic())


_EVERY_S = {"lesson": LESSON_S, "update": UPDATE_S, "broker": BROKER_S}


def _same_photo(last: int) -> list[str]:
    """The last frames that show what frame `last` shows."""
    return [frame_id(number) for number in range(last, -1, -DISTINCT_FRAMES)[:EXAMPLES]]


def _ask(monitor: Listener, verb: str, arguments: dict[str, Any]) -> str | None:
    """Send a command; why it was refused, or None."""
    name = f"{verb}-{time.monotonic_ns()}"
    monitor.send(encode_command(Command(id=name, verb=verb, expires=time.time() + 60, arguments=arguments)))
    try:
        payload = monitor.wait_for("reply", lambda payload: decode_reply(payload).id == name, REPLY_TIMEOUT_S)
    except TimeoutError:
        return f"{verb}: no reply within {REPLY_TIMEOUT_S:.0f} s"
    reply = decode_reply(payload)
    return None if reply.ok else f"{verb}: {reply.error}"


def theil_sen(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Median of the slopes of all pairs of points, and its 95 % interval (Sen 1968, by Kendall's tau, no ties in x)."""
    count = len(x)
    if count < 3:
        raise ValueError(f"a slope with an interval needs 3 points or more, got {count}")
    first, second = np.triu_indices(count, 1)
    across, up = np.asarray(x, float), np.asarray(y, float)
    slopes = np.sort((up[second] - up[first]) / (across[second] - across[first]))
    width = SMOOTH * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low, high = int((len(slopes) - width) / 2), math.ceil((len(slopes) + width) / 2)
    last = len(slopes) - 1
    return Slope(float(np.median(slopes)), float(slopes[max(low, 0)]), float(slopes[min(high, last)]))


def row_of(samples: Sequence[Sample], tally: Tally) -> Row:
    """What the samples after the warm-up say."""
    kept = samples[int(WARM_UP_SHARE * len(samples)) :]
    hours = [sample.seconds / 3600 for sample in kept]
    rss, pss = (theil_sen(hours, [getattr(sample, name) for sample in kept]) for name in ("rss_mb", "pss_mb"))
    quarter = max(len(kept) // 4, 1)
    return {
        "minutes": round(samples[-1].seconds / 60, 1),
        "frames": samples[-1].frames,
        "updates": tally.updates,
        "lessons": tally.lessons,
        "undone": tally.undone,
        "refused": len(tally.refused),
        "broker_restarts": tally.broker_restarts,
        "rss_slope_mb_per_h": round(rss.value, 2),
        "rss_slope_low": round(rss.low, 2),
        "rss_slope_high": round(rss.high, 2),
        "pss_slope_mb_per_h": round(pss.value, 2),
        "rss_first_mb": round(float(np.median([sample.rss_mb for sample in kept[:quarter]])), 1),
        "rss_last_mb": round(float(np.median([sample.rss_mb for sample in kept[-quarter:]])), 1),
        "rss_peak_mb": round(max(sample.rss_mb for sample in kept), 1),
        "descriptors_first": int(np.median([sample.descriptors for sample in kept[:quarter]])),
        "descriptors_last": int(np.median([sample.descriptors for sample in kept[-quarter:]])),
        "threads_first": int(np.median([sample.threads for sample in kept[:quarter]])),
        "threads_last": int(np.median([sample.threads for sample in kept[-quarter:]])),
        "spool_peak_mb": round(max(sample.spool_mb for sample in kept), 2),
        "is_flat": is_flat(kept, rss),
    }


def is_flat(samples: Sequence[Sample], rss: Slope) -> bool:
    """No slope that the interval tells from zero and that matters, and nothing more held open at the end."""
    quarter = max(len(samples) // 4, 1)

    def grew(name: str) -> bool:
        first, last = ([getattr(sample, name) for sample in part] for part in (samples[:quarter], samples[-quarter:]))
        return bool(np.median(last) > np.median(first))

    return not (rss.low > 0 and rss.value > MAX_SLOPE_MB_PER_H) and not grew("descriptors") and not grew("threads")


def _notes() -> str:
    return (
        f"One sample every {SAMPLE_S:.0f} s; the first {WARM_UP_SHARE:.0%} are warm-up. Every {UPDATE_S:.0f} s the other "
        f"model is installed, every {LESSON_S:.0f} s a class is taught and taken back, every {BROKER_S:.0f} s the broker is "
        f"restarted. `is_flat`: the slope's interval holds zero or the slope is below {MAX_SLOPE_MB_PER_H:g} MB/h, and the "
        "medians of descriptors and threads of the last quarter are not above those of the first. "
        "`first` and `last` are medians of those quarters."
    )


if __name__ == "__main__":
    sys.exit(main())
