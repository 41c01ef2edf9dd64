"""Label-distribution-aware margins (LDAM): rare classes must win by more. It trains the long-tail teacher.

Source: Cao et al. 2019, arXiv:1906.07413, with the constants of the authors' code: margins in proportion to n^(-1/4),
the largest 0.5; cosines times 30; deferred re-weighting. DeiT-LT's teachers (Rangwani et al. 2024, arXiv:2404.02900)
add sharpness-aware steps, which are the optimizer's part.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.distill.class_balance import (
    BETA,
    DeferredReweighting,
    require_counts_of,
    require_images_of_every_class,
)
from host.errors import ModelError
from host.models.resnet_cifar import NormalizedLinear
from host.training.objective import Objective, Outcome


def ldam_margins(class_counts: Sequence[int], max_margin: float = 0.5) -> np.ndarray:
    """Margins float64 [K]: in proportion to n^(-1/4), `max_margin` for the rarest class.

    Raises:
        DataError: a class has no image.
    """
    require_images_of_every_class(class_counts)
    margins = np.asarray(class_counts, dtype=np.float64) ** -0.25
    return margins * (max_margin / margins.max())


class LDAM(Objective):
    """Cross-entropy of scaled cosines, the right class's reduced by its margin, re-weighted from some epoch on.

    To be trained in float32, as by the authors: bfloat16 rounds a cosine near 1 by up to 1/512, times 30.

    Args:
        model: its logits are cosines (`NormalizedLinear`).
        class_counts: training images of each class.
        max_margin: that of the rarest class; 0.5 on CIFAR, 0.3 on ImageNet-LT.
        scale: what cosines are multiplied by.
        reweight_from_epoch: counted from 1; None: never. See `DeferredReweighting`.
        beta: of the class weights.

    Raises:
        ModelError: logits that are not cosines, on which margins in fractions of 1 would mean nothing.
        DataError: a class has no image, or the counts are of other classes.
    """

    takes_mixed = False  # the margin belongs to one right class

    def __init__(
        self,
        model: nn.Module,
        class_counts: Sequence[int],
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        reweight_from_epoch: int | None = None,
        beta: float = BETA,
    ) -> None:
        super().__init__(model)
        if not isinstance(model.head, NormalizedLinear):
            raise ModelError(
                f"LDAM needs a normalized classifier, and this {type(model).__name__} has a "
                f"{type(model.head).__name__}; take one such as resnet-cifar/32-normalized"
            )
        require_counts_of(model, class_counts)
        self.scale = scale
        margins = torch.tensor(ldam_margins(class_counts, max_margin), dtype=torch.float32)
        self.register_buffer("margins", margins, persistent=False)
        self.reweighting = DeferredReweighting(class_counts, from_epoch=reweight_from_epoch, beta=beta)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.reweighting.start_epoch(epoch)

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        assert targets is None
        cosines = self.model(images_nchw).float()  # [B, K]
        margins = self.margins * F.one_hot(labels, len(self.margins))
        return Outcome(self.reweighting(self.scale * (cosines - margins), labels), cosines, labels)
