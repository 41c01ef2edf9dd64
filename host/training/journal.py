"""What a training run writes down: `metrics.jsonl`, a line per epoch, and TensorBoard's files where it is installed."""

import json
from dataclasses import asdict
from pathlib import Path

from host.training.loop import EpochMetrics

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Journal:
    """The journal of a run in `directory`, begun anew.

    A run that goes on tells its earlier epochs again, so nothing is missing and nothing stands twice.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._boards: dict = {}
        (directory / METRICS).unlink(missing_ok=True)

    def write(self, model: str, metrics: EpochMetrics) -> None:
        """Add one epoch of `model`, such as the teacher."""
        with (self.directory / METRICS).open("a") as file:
            file.write(json.dumps({"model": model, **asdict(metrics)}) + "\n")
        board = self._board(model)
        if board:
            values = {"loss": metrics.loss, "accuracy": metrics.accuracy, "learning_rate": metrics.learning_rate}
            values |= {f"validation_{name}": value for name, value in metrics.validation.items()}
            for name, value in values.items():
                board.add_scalar(name, value, metrics.epoch)
            board.flush()

    def _board(self, model: str):
        if model not in self._boards:
            self._boards[model] = _open_board(self.directory / TENSORBOARD / model)
        return self._boards[model]


def _open_board(directory: Path):
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory))
