"""What every distillation method offers."""

from typing import Protocol

from torch import Tensor


class Distillation(Protocol):
    """A loss that learns from a teacher's logits as well as from labels."""

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of student [B, K] against teacher [B, K] and labels [B]."""
