"""What a model did since it serves on probation, and whether that is within the board's budgets.

The self-test measured an idle board for a second. Here are the real frames, beside everything else the board does: a model
that is too slow, or takes more memory, for as long as `SUSTAINED` windows goes. One slow frame proves nothing.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from device.contract.board import Budget

WINDOW_FRAMES = 20
SUSTAINED = 2
"""So many windows in a row: 40 frames. A soak that is shorter is judged once, by all of its frames."""
MEMORY_LOOKS = 3
"""So many looks in a row, one at each window's end or `MEMORY_LOOK_S`."""
MEMORY_LOOK_S = 1.0


@dataclass(slots=True, kw_only=True)
class Probation:
    """Only the frame loop counts, so counting needs no lock.

    `memory_before` is the agent's resident memory before it loaded the model: what it grew by since is the model's.
    """

    memory_before: int
    since: float = 0.0
    budget: Budget | None = None
    good_frames: int = 0
    bad_frames: int = 0
    problem: str = ""
    _latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_FRAMES * SUSTAINED))
    _slow_windows: int = 0
    _hungry_looks: int = 0
    _next_look: float = 0.0
    _memory_mb: float = 0.0

    def begin(self, now: float, budget: Budget | None) -> None:
        """The model serves from now on; without a budget, none is breached."""
        self.since, self.budget = now, budget

    def count_good_frame(self, latency_ms: float) -> None:
        self.good_frames += 1
        self._latencies_ms.append(latency_ms)
        if self.budget and self.good_frames % WINDOW_FRAMES == 0:
            window = list(self._latencies_ms)[-WINDOW_FRAMES:]
            self._slow_windows = self._slow_windows + 1 if np.median(window) > self.budget.latency_ms else 0

    def count_bad_frame(self, problem: str) -> None:
        self.bad_frames += 1
        self.problem = problem

    def look_at_memory(self, memory: int, now: float) -> None:
        """Take the agent's resident memory, bytes, at most once in `MEMORY_LOOK_S`."""
        if self.budget is None or now < self._next_look:
            return
        self._next_look = now + MEMORY_LOOK_S
        self._memory_mb = (memory - self.memory_before) / (1 << 20)
        self._hungry_looks = self._hungry_looks + 1 if self._memory_mb > self.budget.peak_memory_mb else 0

    def breach(self, *, is_over: bool) -> str:
        """What is over budget, or "".

        Args:
            is_over: the soak is over: judge by what there is.
        """
        if self.budget is None:
            return ""
        if self._latencies_ms and (self._slow_windows >= SUSTAINED or is_over):
            p50 = float(np.median(self._latencies_ms))
            if p50 > self.budget.latency_ms:
                return f"{p50:.1f} ms a frame (p50 of the last {len(self._latencies_ms)}), {self.budget.latency_ms:.1f} are allowed"
        if self._hungry_looks >= MEMORY_LOOKS or (self._hungry_looks and is_over):
            return f"the agent grew by {self._memory_mb:.0f} MB, {self.budget.peak_memory_mb} are allowed"
        return ""
