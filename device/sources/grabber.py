"""A thread that opens a capture device or file, reads it, and opens it again when it fails or goes away.

The frame loop never waits for a driver: a camera that hangs costs frames, not the agent. What is not open is tried again
after a pause that doubles up to `BACKOFF_S[1]`; each failed attempt is one bad frame of reason `source`, so that telemetry
shows for how long it lasts, and `problem` says what is wrong.

A live capture hands over its newest frame only: while the model is slower than the camera, frames are dropped and counted,
and no frame is older than one inference and one interval. A recording is read frame by frame, as fast as they are taken.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Protocol

import numpy as np

from device.contract.errors import FrameError, one_line
from device.frames import Frame
from device.pictures import grey_of
from device.sources.handover import Handover
from device.sources.source import Tally

BACKOFF_S = (0.5, 30.0)
STALL_S = 15.0
"""Without a frame for so long, a live capture has a problem, even where its driver reports none."""
STOP_S = 2.0

log = logging.getLogger(__name__)


class Capture(Protocol):
    """An opened device or file."""

    def read(self, stop: threading.Event) -> tuple[str, np.ndarray] | None:
        """The next frame's id and pixels, RGB uint8 [h, w, 3] that nobody else writes to; None at the end.

        Raises:
            FrameError: it is gone, or what it gives is damaged.
        """

    def close(self) -> None:
        """Give the device back."""


class Grabber:
    """A source of what a capture reads.

    Args:
        name: of the thread, and in messages.
        open_capture: opens it; raises FrameError.
        is_live: newest frame only, instead of all.
        is_endless: a recording begins again at its end.
    """

    def __init__(
        self,
        name: str,
        open_capture: Callable[[], Capture],
        *,
        is_live: bool,
        is_endless: bool = True,
    ) -> None:
        self.tally = Tally()
        self._name, self._open, self._is_live, self._is_endless = name, open_capture, is_live, is_endless
        self._frames: Handover[tuple[str, np.ndarray]] = Handover(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)  # a driver may never return
        self._problem = ""
        self._last_frame_at = time.monotonic()
        self.is_at_end = False

    @property
    def problem(self) -> str:
        silence_s = time.monotonic() - self._last_frame_at
        is_stalled = self._is_live and not self.is_at_end and silence_s > STALL_S
        return self._problem or (f"{self._name}: no frame for {STALL_S:.0f} s" if is_stalled else "")

    def start(self) -> None:
        self._last_frame_at = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def poll(self, channels: int) -> Iterator[Frame]:
        while (item := self._frames.take()) is not None:
            frame_id, rgb = item
            yield Frame(frame_id, grey_of(rgb) if channels == 1 else rgb)

    def wait(self, timeout_s: float, stop: threading.Event) -> None:
        self._frames.wait(timeout_s, stop)

    def _run(self) -> None:
        failures = 0
        while not (self._stop.is_set() or self.is_at_end):
            has_frames = False
            try:
                with closing(self._open()) as capture:
                    for frame in iter(lambda: capture.read(self._stop), None):
                        has_frames = True
                        self._hand_over(frame)
                        if self._stop.is_set():
                            return
                self.is_at_end = not self._is_endless
                if has_frames and self.is_at_end:
                    log.info("%s: was read to its end; no more frames come", self._name)
                if not has_frames:
                    raise FrameError(f"{self._name}: holds no frames", reason="source")
                failures = 0
            except FrameError as error:
                self.is_at_end = has_frames and not self._is_endless  # cut off: what there was of it was used
                failures = 1 if has_frames else failures + 1
                self._fail(error, error.reason)
            except Exception as error:  # this thread's outer loop: whatever a driver does, it is tried again
                log.exception("%s: unexpected error", self._name)
                failures += 1
                self._fail(error, "source")
            if failures:
                self._stop.wait(min(BACKOFF_S[0] * 2 ** min(failures - 1, 16), BACKOFF_S[1]))

    def _hand_over(self, frame: tuple[str, np.ndarray]) -> None:
        self._last_frame_at = time.monotonic()
        if self._problem:
            log.info("%s: frames come again", self._name)
            self._problem = ""
        if not self._is_live:
            self._frames.put_when_there_is_room(frame, self._stop)
        elif self._frames.put_newest(frame):
            self.tally.count_dropped()

    def _fail(self, error: Exception, reason: str) -> None:
        if self._stop.is_set():  # a read that was cut short
            return
        self.tally.count_bad(reason)
        problem = one_line(error)
        if problem != self._problem:
            log.warning("%s; trying again", problem)
        self._problem = problem
