"""What training minimizes: a model together with its loss.

An objective is a module, so that the engine of several processes sees all that has weights: the model, and what helps
to train it and is thrown away afterwards. A frozen teacher is not part of it.
"""

from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn import functional as F


class Outcome(NamedTuple):
    """The scalar loss of a batch; its logits [b, K], and the labels [b] they are compared with for the shown accuracy."""

    loss: Tensor
    logits: Tensor
    labels: Tensor


class Objective(nn.Module):
    """A model and the loss it is trained with; subclasses say which in `forward`.

    Attributes:
        model: what is kept after training.
        takes_mixed: whether images mixed of two, with the targets that go with them, are understood.
    """

    takes_mixed = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before every epoch, which counts from 1, on every process."""

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        """The loss of a batch.

        Args:
            images_nchw: float [B, C, H, W], augmented, perhaps mixed.
            labels: int64 [B], of the images before they were mixed.
            targets: probabilities [B, K] where images were mixed; they hold any label smoothing already.
        """
        raise NotImplementedError


class CrossEntropy(Objective):
    """Cross-entropy of the model's logits, with smoothed labels."""

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        logits = self.model(images_nchw)
        return Outcome(cross_entropy(logits, labels, targets, label_smoothing=self.label_smoothing), logits, labels)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy with the targets of mixed images where there are any, else with smoothed labels; in float32."""
    if targets is not None:
        return F.cross_entropy(logits.float(), targets)
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


class Teacher(Protocol):
    """Gives logits [B, K] for the student's own batch; nothing in it is trained."""

    def __call__(self, images_nchw: Tensor) -> Tensor:
        """Logits [B, K] of float [B, C, H, W], without gradients."""
