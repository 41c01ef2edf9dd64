"""What a simulated board measures between two telemetry messages: the values of the agent's window, from a seed.

Each board has its own latency, temperature, memory and class mix. `shift` is how far the frames, or a bad model's features,
are from those of the training: 0 as usual, 1 clearly elsewhere.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass

from device.contract.messages import CLASS_PREFIX

MIN_DRIFT_FRAMES = 32
"""Below this many frames an agent reports no drift."""
LATE, VERY_LATE = 1.25, 1.7
"""p90 and p99 latency, relative to p50."""
SLOWER = 5.0
FAILING_SHARE = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a window is measured under: frames per second, seconds, drift of the frames, and what the model does wrong."""

    frames_per_s: float
    elapsed_s: float
    shift: float = 0.0
    effect: str = ""


class Windows:
    """One board's measurements; `rng` decides all of them, in order."""

    def __init__(self, rng: random.Random, *, latency_s: float, memory_bytes: int) -> None:
        self._rng = rng
        self._latency_s = latency_s * rng.lognormvariate(0, 0.2)
        self._memory_bytes = memory_bytes * rng.uniform(0.8, 1.2)
        self._celsius = rng.uniform(42, 58)
        self._confidence = rng.uniform(0.82, 0.95)
        self._drift = rng.uniform(0.08, 0.2)
        self._tastes: list[float] = []

    def measure(self, classes: int, condition: Condition) -> dict[str, float]:
        """The values of one window, under the names of the telemetry contract."""
        rng = self._rng
        shift = max(condition.shift, 1.0 if condition.effect == "drift" else 0.0)
        seen = round(condition.frames_per_s * condition.elapsed_s)
        failed = sum(rng.random() < FAILING_SHARE for _ in range(seen)) if condition.effect == "errors" else 0
        frames = seen - failed
        values = {"frames": float(frames), "throughput": frames / condition.elapsed_s}
        if frames:
            p50 = self._latency_s * rng.lognormvariate(0, 0.05) * (SLOWER if condition.effect == "latency" else 1)
            values |= {"latency/p50": p50, "latency/p90": LATE * p50, "latency/p99": VERY_LATE * p50}
            values["confidence"] = min(1.0, max(0.0, rng.gauss(self._confidence - 0.35 * shift, 0.02)))
            counts = Counter(rng.choices(range(classes), weights=self._mix(classes, shift), k=frames))
            values |= {f"{CLASS_PREFIX}{index}": float(count) for index, count in sorted(counts.items())}
        if frames >= MIN_DRIFT_FRAMES:
            values["drift"] = abs(rng.gauss(self._drift + 1.4 * shift, 0.02))
        values |= {"errors": float(failed), "memory": math.floor(self._memory_bytes * rng.uniform(0.98, 1.02))}
        values["temperature"] = round(rng.gauss(self._celsius, 0.8), 1)
        return values

    def _mix(self, classes: int, shift: float) -> list[float]:
        """How often each class is seen; with the shift, the last ones take the place of the first ones."""
        while len(self._tastes) < classes:
            self._tastes.append(self._rng.gammavariate(2.0, 1.0) + 0.01)
        usual = self._tastes[:classes]
        return [(1 - shift) * here + shift * there for here, there in zip(usual, reversed(usual), strict=True)]
