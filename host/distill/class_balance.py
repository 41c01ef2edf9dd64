"""Class weights by the effective number of images, from some epoch on: deferred re-weighting (DRW).

A class with n images weighs (1 - b) / (1 - b^n): Cui et al. 2019, arXiv:1901.05555. Waiting with it until features have
formed is from LDAM, Cao et al. 2019, arXiv:1906.07413, whose code also scales the weights to a mean of 1 and counts
epochs from 0; here they count from 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import DataError

BETA = 0.9999


def effective_number_weights(class_counts: Sequence[int], beta: float = BETA) -> np.ndarray:
    """Weights float64 [K] with a mean of 1, larger for rarer classes.

    Args:
        class_counts: training images of each class.
        beta: 0 gives equal weights, 1 would give those by inverse count.

    Raises:
        DataError: a class has no image.
    """
    require_images_of_every_class(class_counts)
    weights = (1 - beta) / (1 - beta ** np.asarray(class_counts, dtype=np.float64))
    return weights / weights.mean()


class DeferredReweighting(nn.Module):
    """Cross-entropy with hard labels, by class weights from one epoch on.

    A weighted mean divides by the weights of the batch, as PyTorch's does. Every process of several divides by those of
    its own part, whose mean is not quite that of the whole batch.

    Args:
        class_counts: training images of each class.
        from_epoch: the first re-weighted one, counted from 1; None: none is.
        beta: see `effective_number_weights`.

    Raises:
        DataError: a class has no image.
    """

    def __init__(self, class_counts: Sequence[int], *, from_epoch: int | None, beta: float = BETA) -> None:
        super().__init__()
        weights = torch.tensor(effective_number_weights(class_counts, beta), dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.from_epoch = from_epoch
        self.is_on = False

    def start_epoch(self, epoch: int) -> None:
        self.is_on = self.from_epoch is not None and epoch >= self.from_epoch

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of logits [B, K] with labels [B]."""
        return F.cross_entropy(logits.float(), labels, weight=self.class_weights if self.is_on else None)


def require_images_of_every_class(class_counts: Sequence[int]) -> None:
    """Refuse counts that have no logarithm or power.

    Raises:
        DataError: a class has no image.
    """
    for label, count in enumerate(class_counts):
        if count < 1:
            raise DataError(
                f"class {label} has {count} training images; give every class at least one, or leave it out"
            )


def require_counts_of(model: nn.Module, class_counts: Sequence[int]) -> None:
    """Refuse counts of other classes than the model's, before training reaches the epoch that uses them.

    Raises:
        DataError: there are more or fewer.
    """
    if len(class_counts) != model.head.out_features:
        raise DataError(
            f"{len(class_counts)} class counts for a model of {model.head.out_features} classes; count the images of "
            "the data that it is trained on"
        )
