"""Frames that come as MQTT messages: one encoded picture each, JPEG, PNG, .npy or binary PGM / PPM.

They are held in memory alone, at most `size` of them and `MAX_FRAME_PAYLOAD_BYTES` each, until they are classified; where
more come than the model can take, the oldest are dropped and counted. Nothing is written to the disk. What is retained on
the topic is refused: it is an image that somebody keeps on the broker, and would come again at each connect.

A frame's id is `mqtt/` and the first 16 hex digits of its payload's SHA-256: whoever sent it knows the id without being told.
"""

import hashlib
import threading
import time
from collections.abc import Iterator

from device.contract.errors import FrameError
from device.contract.messages import MAX_FRAME_PAYLOAD_BYTES
from device.frames import Frame, decode_frame
from device.sources.handover import Handover
from device.sources.source import BAD_FRAMES_S, Tally


class MessageSource:
    """The connection's thread puts payloads in, the frame loop decodes them."""

    problem = ""

    def __init__(self, size: int) -> None:
        self.tally = Tally()
        self._payloads: Handover[bytes] = Handover(size)

    def receive(self, payload: bytes, *, is_retained: bool) -> None:
        """Take a message; quick, and without an error whatever it holds."""
        if is_retained:
            self.tally.skip("a retained frame is not taken; publish frames without the retain flag", "unreadable")
        elif len(payload) > MAX_FRAME_PAYLOAD_BYTES:
            size = f"{len(payload)} bytes, over the limit of {MAX_FRAME_PAYLOAD_BYTES}"
            self.tally.skip(f"a frame of {size}, is not taken; send it smaller", "too-large")
        elif self._payloads.put_newest(payload):
            self.tally.count_dropped()

    def start(self) -> None:
        """Nothing to start: frames come over the agent's own connection."""

    def stop(self) -> None:
        """Nothing to stop."""

    def poll(self, channels: int) -> Iterator[Frame]:
        until = time.monotonic() + BAD_FRAMES_S
        while (payload := self._payloads.take()) is not None:
            frame_id = f"mqtt/{hashlib.sha256(payload).hexdigest()[:16]}"
            try:
                frame = Frame(frame_id, decode_frame(payload, frame_id, channels))
            except FrameError as error:
                self.tally.skip(str(error), error.reason)
                if time.monotonic() > until:  # they may come as fast as they are refused
                    return
                continue
            yield frame
            until = time.monotonic() + BAD_FRAMES_S

    def wait(self, timeout_s: float, stop: threading.Event) -> None:
        self._payloads.wait(timeout_s, stop)
