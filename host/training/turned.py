"""Turned images as classes of their own, beside any loss of logits.

Turned images as further classes follow PASS (Zhu et al. 2021, CVPR, "Prototype augmentation and self-supervision for
incremental learning"); unlike there, turned images are drawn anew for every batch, and their classifier is thrown away
after training.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.data.augment import quarter_turns
from host.training.objective import Objective, Outcome

NUM_TURNS = 4


class LogitsLoss(Protocol):
    """A loss of the model's logits [B, K] for images [B, C, H, W] and labels int64 [B]."""

    def __call__(self, logits: Tensor, images_nchw: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss."""


class TurnedImages(Objective):
    """Upright images under `upright_loss`, and all images told apart by label and turn.

    Args:
        model: has `forward_features`, `feature_dim` and `head`; images are square.
        upright_loss: of the upright images.
        share: of a batch that is turned.
        label_smoothing: of the classes of turned images.
    """

    takes_mixed = False

    def __init__(
        self, model: nn.Module, upright_loss: LogitsLoss, *, share: float, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(model)
        self.upright_loss, self.share, self.label_smoothing = upright_loss, share, label_smoothing
        self.turned_head = nn.Linear(model.feature_dim, model.head.out_features * NUM_TURNS)

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        turns = self._draw_turns(len(images_nchw)).to(labels.device)
        images_nchw = quarter_turns(images_nchw, turns)
        upright = turns == 0
        features = self.model.forward_features(images_nchw)  # [B, D]
        logits = self.model.head(features[upright])
        loss = self.upright_loss(logits, images_nchw[upright], labels[upright])
        turned_logits = self.turned_head(features).float()  # [B, 4 K]
        turned_labels = labels * NUM_TURNS + turns
        loss = loss + F.cross_entropy(turned_logits, turned_labels, label_smoothing=self.label_smoothing)
        return Outcome(loss, logits, labels[upright])

    def _draw_turns(self, count: int) -> Tensor:
        turned = torch.rand(count) < self.share
        turned[0] = False  # a batch without an upright image would have no loss
        return torch.randint(1, NUM_TURNS, (count,)) * turned
