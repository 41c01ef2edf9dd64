"""DeiT-LT: hard distillation on long-tailed data, in which the DIST token becomes the expert for rare classes.

Source: Rangwani et al. 2024, arXiv:2404.02900, and the authors' code. A small convolutional teacher, trained with weak
augmentation and a long-tail loss, is asked about strongly augmented and mixed images that it never saw, so that its
labels differ from the true ones. In the last epochs the DIST token's loss is re-weighted by class, with the weight of
the *teacher's* label; the CLS token's never is.

In their code as here, labels of unmixed images are no longer smoothed once re-weighting has begun (on CIFAR, Mixup ends
then, which is the loop's part). Their epochs count from 0, ours from 1: the published 1100 of 1200 on CIFAR is 1101.

The paper's baselines: DeiT (a) is `HardDistillation` with a teacher trained on the student's own augmentation; DeiT (b)
is this objective without re-weighting.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from host.distill.class_balance import BETA, DeferredReweighting, require_counts_of
from host.distill.method import Distillation, has_two_heads
from host.errors import ModelError
from host.training.objective import Teacher, cross_entropy


class DeiTLT(Distillation):
    """1/2 cross-entropy(CLS, label) + 1/2 re-weighted cross-entropy(DIST, argmax of the teacher's logits).

    Args:
        model: a student with two heads, such as `host.models.deit` with `is_distilled`.
        teacher: outside of what is trained, such as a `FrozenTeacher`.
        class_counts: training images of each class.
        reweight_from_epoch: counted from 1; None: never. See `DeferredReweighting`, also for several processes.
        beta: of the class weights.
        label_smoothing: of unmixed images until re-weighting begins.

    Raises:
        ModelError: the student has one head only, or the teacher is a module.
        DataError: a class has no image, or the counts are of other classes.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        class_counts: Sequence[int],
        *,
        reweight_from_epoch: int | None,
        beta: float = BETA,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(model, teacher, label_smoothing=label_smoothing)
        if not has_two_heads(model):
            raise ModelError(
                f"DeiT-LT trains two heads, and this {type(model).__name__} has one; "
                "take a student with a distillation token, such as deit/tiny-distilled"
            )
        require_counts_of(model, class_counts)
        self.reweighting = DeferredReweighting(class_counts, from_epoch=reweight_from_epoch, beta=beta)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.reweighting.start_epoch(epoch)

    def label_loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        smoothing = 0.0 if self.reweighting.is_on else self.label_smoothing
        return cross_entropy(logits, labels, targets, label_smoothing=smoothing)

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return self.reweighting(logits, teacher_logits.argmax(dim=1))
