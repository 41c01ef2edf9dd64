"""What methods that distil logits share: a student that follows the labels with one head and a teacher with the other.

Touvron et al. 2021, arXiv:2012.12877, section 4: two tokens, or two heads on the same features (EfficientFormer). A
student with one head follows both with the same logits, as in Hinton et al. 2015, arXiv:1503.02531.
"""

from torch import Tensor, nn

from host.errors import ModelError
from host.models.heads import DistillationHeads
from host.training.objective import Objective, Outcome, Teacher, cross_entropy


class Distillation(Objective):
    """(1 - weight) * cross-entropy with the labels + weight * the teacher's loss, which a subclass defines.

    The teacher sees the images that the student sees. Its own labels are never smoothed.

    Args:
        model: the student; see `separate_logits`.
        teacher: outside of what is trained, such as a `FrozenTeacher`.
        weight: the share of the teacher's loss, 0..1.
        label_smoothing: of labels where images are not mixed; 0.1 in DeiT.

    Raises:
        ModelError: the teacher is a module, which would be trained.
    """

    def __init__(
        self, model: nn.Module, teacher: Teacher, *, weight: float = 0.5, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(model)
        if isinstance(teacher, nn.Module):
            raise ModelError(f"a {type(teacher).__name__} as teacher would be trained itself; wrap it in FrozenTeacher")
        self.teacher = teacher
        self.weight = weight
        self.label_smoothing = label_smoothing

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        teacher_logits = self.teacher(images_nchw)  # first: its activations are gone before the student's are kept
        of_labels, of_teacher = separate_logits(self.model, images_nchw)
        label_loss = self.label_loss(of_labels, labels, targets)
        loss = (1 - self.weight) * label_loss + self.weight * self.teacher_loss(of_teacher, teacher_logits)
        return Outcome(loss, (of_labels + of_teacher) / 2, labels)

    def loss_of_logits(self, logits: Tensor, images_nchw: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of one set of logits [B, K], which follows both; for `host.training.turned`."""
        teacher_loss = self.teacher_loss(logits, self.teacher(images_nchw))
        return (1 - self.weight) * self.label_loss(logits, labels, None) + self.weight * teacher_loss

    def label_loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Scalar loss of the logits [B, K] for the labels [B], or for the targets [B, K] of mixed images."""
        return cross_entropy(logits, labels, targets, label_smoothing=self.label_smoothing)

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Scalar loss of the head that follows the teacher, from its logits [B, K] and the teacher's."""
        raise NotImplementedError


def separate_logits(model: nn.Module, images_nchw: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K] for the labels and for the teacher: of two heads, or twice those of a single one."""
    features = model.forward_features(images_nchw)
    if has_two_heads(model):
        return model.head.separate(features)
    logits = model.head(features)
    return logits, logits


def has_two_heads(model: nn.Module) -> bool:
    """Whether a head of its own follows the teacher."""
    return isinstance(model.head, DistillationHeads)
