"""One window of measurements between two telemetry messages, in fixed memory."""

import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from device.contract.messages import CLASS_PREFIX

LATENCIES_KEPT = 4096
MIN_DRIFT_FRAMES = 32
"""Below this many frames chance alone moves the mean by more than a tenth of a standard deviation."""


class Window:
    """Collects per-frame figures. `feature_mean` and `feature_std` [D] are those of the host's training images."""

    def __init__(
        self, feature_mean: np.ndarray, feature_std: np.ndarray, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._mean = feature_mean.astype(np.float64)  # [D]
        self._std = np.maximum(feature_std.astype(np.float64), 1e-6)  # [D]
        self._clock = clock
        self._reset()

    def add(self, *, latency_s: float, class_index: int, confidence: float, features: np.ndarray) -> None:
        """Count one frame."""
        self.frames += 1
        self._latencies.append(latency_s)
        self._confidence += confidence
        self._classes[class_index] += 1
        self._features += features

    def drift(self) -> float | None:
        """Mean over features of |window mean - base mean| / base std; None for too few frames."""
        if self.frames < MIN_DRIFT_FRAMES:
            return None
        return float((np.abs(self._features / self.frames - self._mean) / self._std).mean())

    def close(self) -> dict[str, float]:
        """The window's values under the names of the telemetry contract; starts the next window."""
        elapsed = max(self._clock() - self._since, 1e-9)
        values = {"frames": float(self.frames), "throughput": self.frames / elapsed}
        if self.frames:
            p50, p90, p99 = np.percentile(self._latencies, [50, 90, 99])
            values |= {"latency/p50": float(p50), "latency/p90": float(p90), "latency/p99": float(p99)}
            values["confidence"] = self._confidence / self.frames
            values |= {f"{CLASS_PREFIX}{index}": float(count) for index, count in sorted(self._classes.items())}
        drift = self.drift()
        if drift is not None:
            values["drift"] = drift
        self._reset()
        return values

    def _reset(self) -> None:
        self.frames = 0
        self._since = self._clock()
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._confidence = 0.0
        self._classes: Counter[int] = Counter()
        self._features = np.zeros_like(self._mean)  # [D]


def memory_bytes() -> int:
    """Resident memory of this process; where there is no /proc (macOS), its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _peak_from_rusage()
    return pages * resource.getpagesize()


def peak_memory_bytes() -> int:
    """Peak resident memory since this program started; unlike rusage, without what the parent held before exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _peak_from_rusage()
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return memory_bytes()  # a kernel that does not report the peak


def soc_temp_celsius() -> float | None:
    """The hottest thermal zone, or None where the board reports none."""
    readings = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            readings.append(int(zone.read_text()) / 1000)
        except (OSError, ValueError):  # some zones exist but refuse to be read
            continue
    return max(readings, default=None)


def _peak_from_rusage() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
