"""The start of the agent, in the order that brings the first answer soonest: slots, model, one frame, everything else.

Until the first frame is answered, nothing is loaded that only talks, updates or teaches. The model's files are hashed
while NumPy loads. Nothing is loaded that was not verified, and the slots are in order before either. (The head could be
solved for while LiteRT packs the weights: 7 ms sooner, but a thread's heap of 3.5 MB more.)

A model on probation is loaded later, when the rest is there: what it takes of the memory is measured, and a hang is held
against it. The agent's watchdog is not there yet either; a timer that needs no Python ends a process that hangs here.
"""

import faulthandler
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from device.config import AgentConfig, resolve_runtime
from device.contract.board import Board
from device.contract.bundle import verify_directory
from device.contract.errors import ArtifactError
from device.contract.manifest import Manifest
from device.last_run import begin_run, last_crash
from device.memory import give_back
from device.slots import Slots

if TYPE_CHECKING:
    from device.serving import Attempt

START_S = 120.0
"""How long the first model may take to load until that is called a hang."""
SWITCH_S = 0.0005
"""How long another thread may keep the frame loop from going on after NumPy or LiteRT; Python's 5 ms come several times a frame."""

log = logging.getLogger(__name__)


class Opening:
    """Slots in order, and their model serving. The caller holds the data directory's lock."""

    def __init__(self, root: Path, config: AgentConfig, board: Board) -> None:
        """Put the slots in order, load the model that was confirmed, and answer one frame if there is one.

        Raises:
            ConfigError: the frame source needs a package that is not installed.
        """
        sys.setswitchinterval(SWITCH_S)
        self.slots = Slots(root)
        self.recovered: list[str] = []
        self.disk_error: OSError | None = None
        self._recover(root)
        begin_run(root)
        self.last_number = self.slots.last_number
        entry = self.slots.serving()
        check = _Check(self.slots.directory(entry.slot)) if entry else None
        from device.serving import Serving  # here: NumPy loads while the files are hashed
        from device.sources.open import open_source

        self.serving = Serving(
            self.slots,
            resolve_runtime(board, config.runtime),
            budget=board.budget,
            verify=check.result if check else verify_directory,
        )
        self.source = open_source(config.source, root)
        self._first: Attempt | None = None
        self._is_started = False
        if entry and entry.state != "testing":
            with _ended_if_it_hangs():
                self.finish()
                self._answer_first()
            give_back()  # what was read and computed on the way

    def finish(self) -> None:
        """Load the model if that was not done; `serving.model` is None where none could be loaded."""
        if not self._is_started:
            self._is_started = True
            self.serving.start()
            self.source.start()

    def take_first(self) -> "Attempt | None":
        """What became of the first frame, once."""
        first, self._first = self._first, None
        return first

    def _answer_first(self) -> None:
        from device.serving import attempt

        model = self.serving.model
        if model is None:
            return
        try:
            if frame := next(self.source.poll(model.manifest.input.channels), None):
                self._first = attempt(model, frame)
        except Exception:  # as in the agent's loop: what a part did not foresee must not end the device
            log.exception("unexpected error; going on")

    def _recover(self, root: Path) -> None:
        try:
            self.recovered = self.slots.recover(is_start=True, crash=last_crash(root))
        except OSError as error:  # a disk that takes nothing must not stop inference: what the journal says is served
            self.disk_error = error


class _Check:
    """The verification of one directory, begun before it is asked for; any other is verified when asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory: Path | None = directory
        self._found: Manifest | Exception = ArtifactError(f"{directory}: was not verified")
        self._thread = threading.Thread(target=self._verify, args=(directory,), name="verification", daemon=True)
        self._thread.start()

    def result(self, directory: Path) -> Manifest:
        """The verified manifest, once: the files may change after that."""
        if directory != self._directory:
            return verify_directory(directory)
        self._directory = None
        self._thread.join()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def _verify(self, directory: Path) -> None:
        try:
            self._found = verify_directory(directory)
        except Exception as error:  # raised again where it is waited for
            self._found = error


@contextmanager
def _ended_if_it_hangs() -> Iterator[None]:
    """End the process when the block takes longer than `START_S`, with all stacks on standard error."""
    stream = sys.__stderr__
    if stream is not None and not stream.closed:
        faulthandler.dump_traceback_later(START_S, exit=True, file=stream)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
