"""Soft distillation: the student imitates the teacher's softened probabilities.

Source: Hinton et al. 2015, arXiv:1503.02531, with its factor T squared, which keeps the two parts in proportion.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftDistillation:
    """(1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student), both softened by T = `temperature`."""

    temperature: float
    weight: float
    label_smoothing: float = 0.0

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of student [B, K] against teacher [B, K] and labels [B]."""
        hard_loss = F.cross_entropy(student_logits, labels, label_smoothing=self.label_smoothing)
        return (1 - self.weight) * hard_loss + self.weight * self.temperature**2 * self._soft_loss(
            student_logits, teacher_logits
        )

    def _soft_loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return F.kl_div(
            F.log_softmax(student_logits / self.temperature, dim=1),
            F.log_softmax(teacher_logits / self.temperature, dim=1),
            log_target=True,
            reduction="batchmean",
        )
