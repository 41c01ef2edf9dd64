"""Keep the third-party converters' banners, progress bars and warnings out of the terminal and of `--json`."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed, logged below an error, or warned about inside the block; exceptions pass."""
    previous_level, previous_progress = logging.root.manager.disable, os.environ.get(_PROGRESS)
    os.environ[_PROGRESS] = "n"  # litert-torch has no other switch; its console holds the real stdout
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)
        if previous_progress is None:
            del os.environ[_PROGRESS]
        else:
            os.environ[_PROGRESS] = previous_progress


_PROGRESS = "LITERT_TORCH_SHOW_PROGRESS"
