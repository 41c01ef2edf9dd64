"""Keep the third-party converters' banners, progress bars and warnings out of the terminal and of `--json`."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_PROGRESS = "LITERT_TORCH_SHOW_PROGRESS"
_STDERR = 2


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed, logged below an error, or warned about inside the block; exceptions pass."""
    previous_level, previous_progress = logging.root.manager.disable, os.environ.get(_PROGRESS)
    os.environ[_PROGRESS] = "n"  # litert-torch has no other switch; its console holds the real stdout
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            _quiet_libraries(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)
        if previous_progress is None:
            del os.environ[_PROGRESS]
        else:
            os.environ[_PROGRESS] = previous_progress


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Drop what C++ code writes to standard error, past Python's `sys.stderr`."""
    kept = os.dup(_STDERR)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, _STDERR)
        os.close(null)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
