"""What a long verb shows: a progress bar on a terminal, plain lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_INTERVAL_S = 10.0


class StageLines:
    """Report the progress of stages on stderr; usable as `host.pipeline.Report`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._last_line = 0.0

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        if self._console.is_terminal:
            self._bar(stage, done, total, text)
        elif stage != self._stage or done == total or time.monotonic() - self._last_line > _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            print(f"{stage}: {done}/{total} {text}", file=sys.stderr, flush=True)
        self._stage = stage

    def close(self) -> None:
        """Take the bar away."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _bar(self, stage: str, done: int, total: int, text: str) -> None:
        if self._progress is None or stage != self._stage:
            self.close()
            columns = (TextColumn("{task.fields[stage]:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(
                *columns, TextColumn("{task.fields[text]}"), console=self._console, transient=True
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total, stage=stage, text=text)
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total, text=text)
        if done == total:
            self.close()
