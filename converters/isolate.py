"""Interpret foreign files in a process of their own: some kill the process that loads or runs them.

LiteRT checks much, and still aborts, for example on a scale that its kernels cannot express. The child keeps the file
open and answers calls, so that many images go through one interpreter and only a batch is in memory at a time. It is a
plain Python, not one of `multiprocessing`, which would first import the program that we are part of.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from converters.errors import ConversionError

Opener = Callable[[Path], Callable[..., Any]]
"""Loads a file and returns what answers calls. The child imports it by name, so it is a function of a module."""
_CHILD = "import sys; from converters.isolate import serve; serve(int(sys.argv[1]))"
# our packages are these and no installed ones; then their folder goes, where another NumPy may lie beside them
_ELSEWHERE = (
    "import sys; sys.path.insert(0, sys.argv[2]); import converters, device; del sys.path[0]; "
    "from converters.isolate import serve; serve(int(sys.argv[1]))"
)
_ROOT = Path(__file__).resolve().parents[1]
_GRACE_S = 5.0


@contextmanager
def opened(opener: Opener, path: Path, *, python: Path | None = None) -> Iterator[Callable[..., Any]]:
    """Open a file in a child process; inside the block, calls go to what `opener` returned there.

    Errors that the opener or a call raises are raised here.

    Args:
        opener: see `Opener`.
        path: the file.
        python: the interpreter of another environment. `converters` and `device` are imported there too; the opener may
            import of them what that environment's packages allow, and must turn their errors into ours.

    Raises:
        ConversionError: the file killed the process; the message names the file and the signal.
    """
    here, there = Pipe()
    with subprocess.Popen(
        _command(python, there.fileno()), pass_fds=[there.fileno()], env=_environment(python)
    ) as child:
        there.close()

        def ask(question: Any) -> Any:
            with _deaths_named(child, path):
                here.send(question)
                is_error, result = here.recv()
            if is_error:
                raise result
            return result

        try:
            ask((opener, path))
            yield lambda *arguments: ask(arguments)
        finally:
            here.close()  # the child ends by itself
            with suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)
            child.kill()


def _command(python: Path | None, descriptor: int) -> list[str]:
    if python is None:
        return [sys.executable, "-c", _CHILD, str(descriptor)]
    return [str(python), "-I", "-c", _ELSEWHERE, str(descriptor), str(_ROOT)]


def _environment(python: Path | None) -> dict[str, str]:
    if python is None:
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}  # TensorFlow looks for GPUs, aloud


def serve(descriptor: int) -> None:
    """The child: open the file it is told of, then answer calls until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    pipe = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        opener, path = pipe.recv()
        answers: list[Callable[..., Any]] = []
        _reply(pipe, lambda: answers.append(opener(path)))
        while answers:
            arguments = pipe.recv()
            _reply(pipe, lambda arguments=arguments: answers[0](*arguments))


def _reply(pipe: Connection, compute: Callable[[], Any]) -> None:
    try:
        reply = (False, compute())
    except Exception as error:  # whatever it is, the parent raises it
        reply = (True, error)
    pipe.send(reply)


@contextmanager
def _deaths_named(child: "subprocess.Popen[bytes]", path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        code = child.wait(_GRACE_S)
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ConversionError(
            f"{path}: killed the process that interprets it ({cause}); the file is damaged, export it again"
        ) from error
