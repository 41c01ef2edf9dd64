"""The child process that runs one model: `python -c "from host.bench.worker import main; main()" DESCRIPTOR`.

It takes (method, arguments) from a connection and sends back what the method returns. What goes wrong is left to kill it:
`host.bench.process` tells of the death, be it an exception or a signal.
"""

import sys
import time
from multiprocessing.connection import Connection

import numpy as np

from host.bench.runtimes import Subject, load
from host.memory import own_peak_bytes


class Session:
    """A loaded subject and the commands it takes."""

    def __init__(self, subject: Subject) -> None:
        self._runtime = load(subject)

    def query(self, index: int) -> tuple[float, float]:
        """Answer one query; returns the seconds by the wall clock and those of this process's processor time."""
        sample = self._runtime.samples[index % len(self._runtime.samples)]
        processor_start, start = time.process_time(), time.perf_counter()
        self._runtime.query(sample)
        return time.perf_counter() - start, time.process_time() - processor_start

    def peak_bytes(self) -> int:
        """Peak resident memory of this process so far."""
        return own_peak_bytes()

    def answers(self, images: np.ndarray) -> np.ndarray:
        """Classify images float32 [n, H, W, C], not timed; returns int64 [n]."""
        return np.array([self._runtime.query([image[None]]).argmax() for image in images], np.int64)


def main() -> None:
    """Serve one subject until the other end closes."""
    connection = Connection(int(sys.argv[1]))
    session = Session(connection.recv())
    connection.send(None)  # it is loaded
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(session, name)(*arguments))
