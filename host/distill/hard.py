"""Hard distillation: the class that the teacher prefers is a label like any other.

Source: Touvron et al. 2021, arXiv:2012.12877, "hard-label distillation"; there with equal weights, labels smoothed by
0.1 and the teacher's not. What the teacher says of a mixed image is one label.

With a teacher that was trained with the student's own augmentation, this is the baseline that DeiT-LT (Rangwani et al.
2024, arXiv:2404.02900) compares itself with; see `host.distill.deit_lt`.
"""

from torch import Tensor
from torch.nn import functional as F

from host.distill.method import Distillation


class HardDistillation(Distillation):
    """(1 - weight) * cross-entropy with the labels + weight * cross-entropy with argmax of the teacher's logits."""

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))
