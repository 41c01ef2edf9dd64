"""A worker seen from outside: it starts, it answers, and what it dies of becomes one line that names the file."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from itertools import takewhile
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from host.bench.runtimes import Subject
from host.errors import BenchError

_ROOT = str(Path(__file__).parents[2])
_SCRIPT = "from host.bench.worker import main; main()"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_END_S = 5.0


class Worker:
    """One subject in a process of its own. Every method raises BenchError if the process dies of it."""

    def __init__(self, subject: Subject) -> None:
        """Start the process and load the subject."""
        self.subject = subject
        self._queries = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SCRIPT, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env=_environment(subject.num_threads),
            )
        try:
            self._exchange(subject)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def query(self) -> tuple[float, float]:
        """Send the next query; returns wall and processor seconds, both taken inside the worker."""
        self._queries += 1
        wall, processor = self._exchange(("query", (self._queries - 1,)))
        return wall, processor

    def peak_bytes(self) -> int:
        return int(self._exchange(("peak_bytes", ())))

    def answers(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._exchange(("answers", (images,))))

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _exchange(self, message: Any) -> Any:
        try:
            self._connection.send(message)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    def _death(self) -> BenchError:
        code = self._process.wait(_END_S)
        self._log.seek(0)
        words = last_words(self._log.read().decode(errors="replace"))
        doing = f"at query {self._queries}" if self._queries else "while it was loaded"
        if code < 0:
            how = f"crashed the runtime {doing} ({signal.Signals(-code).name}{f': {words}' if words else ''})"
        else:
            how = f"failed {doing}: {words or f'exit code {code}'}"
        return BenchError(f"{self.subject.name} {how}; leave it out, or convert it again")


def last_words(log: str) -> str:
    """What a process said last: the message of its exception, or its last lines, without LiteRT's notes."""
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("INFO:")]
    tail = list(takewhile(lambda line: not line.startswith((" ", "Traceback")), reversed(lines)))
    return re.sub(r"^[\w.]+(Error|Exception): ", "", " ".join(reversed(tail[:4])))


def _environment(num_threads: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(_THREAD_VARIABLES, str(num_threads))}
