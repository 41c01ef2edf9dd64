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
        self._start = (0.0, 0)  # time and count of the stage's first report: a run that goes on does not begin at 0

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        if stage != self._stage or done < self._start[1]:
            self._start = (time.monotonic(), done)
        if self._console.is_terminal:
            self._bar(stage, done, total, text)
        elif stage != self._stage or done == total or time.monotonic() - self._last_line > _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            print(f"{stage}: {done}/{total} {text}{self._remaining(done, total)}", file=sys.stderr, flush=True)
        self._stage = stage

    def _remaining(self, done: int, total: int) -> str:
        """How long the stage will still take, from its pace so far; nothing where that is not known or soon."""
        started, first = self._start
        elapsed = time.monotonic() - started
        if elapsed < _LINE_INTERVAL_S or not first < done < total:
            return ""
        left = elapsed / (done - first) * (total - done)
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"

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
