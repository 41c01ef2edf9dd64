"""Feature distillation: a linear projection of the student's features imitates the teacher's.

Source: FitNets, Romero et al. 2015, arXiv:1412.6550, with a regressor between features of different widths. We differ
in what is imitated, which is the penultimate vector and not a hidden map; in training hint and labels together instead
of the hint first; and in taking the mean of the squared differences instead of half their sum, so that `weight` means
the same at every width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from host.distill.teacher import FrozenTeacher
from host.training.objective import Objective, Outcome, cross_entropy


class FeatureDistillation(Objective):
    """Cross-entropy + weight * mean squared difference between projected features [B, T] and the teacher's.

    Args:
        model: the student; with two heads, their mean follows the labels.
        teacher: its features are imitated, its logits not used.
        weight: of the squared difference, 0 or more.
        label_smoothing: of labels where images are not mixed.

    Attributes:
        projection: from the student's D to the teacher's T features; of no use after training.
    """

    def __init__(
        self, model: nn.Module, teacher: FrozenTeacher, *, weight: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(model)
        self.teacher = teacher
        self.weight = weight
        self.label_smoothing = label_smoothing
        self.projection = nn.Linear(model.feature_dim, teacher.feature_dim)

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        teacher_features = self.teacher.features(images_nchw)  # [B, T]
        features = self.model.forward_features(images_nchw)  # [B, D]
        logits = self.model.head(features)
        label_loss = cross_entropy(logits, labels, targets, label_smoothing=self.label_smoothing)
        feature_loss = F.mse_loss(self.projection(features).float(), teacher_features.float())
        return Outcome(label_loss + self.weight * feature_loss, logits, labels)
