"""Soft distillation: the student imitates the teacher's softened probabilities.

Source: Hinton et al. 2015, arXiv:1503.02531, with its factor T squared, which keeps the two parts in proportion. With
two heads it is that of DeiT (Touvron et al. 2021, arXiv:2012.12877, weight 0.1 and T 3), whose code divides the
divergence by the number of classes as well; here, as in the paper, it is the mean over images.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from host.distill.method import Distillation
from host.training.objective import Teacher


class SoftDistillation(Distillation):
    """(1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student), both softened by T = `temperature`.

    The arguments of `Distillation`, and T > 0.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        *,
        temperature: float,
        weight: float = 0.5,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, teacher, weight=weight, label_smoothing=label_smoothing)
        self.temperature = temperature

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        divergence = F.kl_div(
            F.log_softmax(logits.float() / self.temperature, dim=1),
            F.log_softmax(teacher_logits.float() / self.temperature, dim=1),
            log_target=True,
            reduction="batchmean",
        )
        return self.temperature**2 * divergence
