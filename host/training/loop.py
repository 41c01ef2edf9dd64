"""The training loop: AdamW, warm-up and cosine, augmentation, turned images as classes of their own, distillation.

Same machine, same seed: the same weights, bit for bit. Turned images as further classes follow PASS (Zhu et al. 2021,
CVPR, "Prototype augmentation and self-supervision for incremental learning"); unlike there, turned images are drawn
anew for every batch, and their classifier is thrown away after training.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.data.augment import augment, quarter_turns
from host.distill.method import Distillation
from host.errors import TrainingError
from host.training.config import TrainConfig

NUM_TURNS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch, counted from 1: mean loss of its batches, accuracy on its upright augmented images."""

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


def train(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    config: TrainConfig,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    distill: Distillation | None = None,
    on_epoch: Callable[[EpochMetrics], None] = lambda metrics: None,
) -> list[EpochMetrics]:
    """Train `model` in place and leave it in evaluation mode.

    Args:
        model: has `forward_features`, `feature_dim` and a linear `head`.
        images: float32 [N, H, W, C], square, pre-processed by `device.preprocess`.
        labels: int64 [N], 0..K-1.
        config: how to train.
        seed: of batches, augmentation and the classifier of turned images.
        teacher: gives `distill` its logits; left as it is.
        distill: replaces the cross-entropy on upright images; goes with `teacher`.
        on_epoch: called after every epoch.

    Raises:
        TrainingError: fewer images than a batch, a teacher without a method or the reverse, or a loss that is not
            finite.
    """
    if len(images) < config.batch_size:
        raise TrainingError(
            f"{len(images)} images are fewer than a batch of {config.batch_size}; lower train.batch_size"
        )
    if (teacher is None) != (distill is None):
        raise TrainingError("a teacher and a distillation method go together; give both or none")
    with _deterministic(seed):
        run = _Run(model, config, teacher, distill, seed=seed, steps=config.epochs * (len(images) // config.batch_size))
        metrics = []
        for epoch in range(1, config.epochs + 1):
            metrics.append(run.epoch(epoch, torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)))
            on_epoch(metrics[-1])
    model.eval()
    return metrics


class _Run:
    """What lasts from batch to batch: optimizer, schedule, generator and the classifier of turned images."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        teacher: nn.Module | None,
        distill: Distillation | None,
        *,
        seed: int,
        steps: int,
    ) -> None:
        self.model, self.config, self.distill = model.train(), config, distill
        self.teacher = teacher.eval() if teacher else None
        self.generator = torch.Generator().manual_seed(seed)
        self.turned_head = nn.Linear(model.feature_dim, model.head.out_features * NUM_TURNS)
        self.parameters = [*model.parameters(), *self.turned_head.parameters()]
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.parameters, config.weight_decay), lr=config.learning_rate, fused=True
        )
        warmup = math.ceil(steps * config.warmup_share)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _lr_factor(step, warmup, steps))

    def epoch(self, epoch: int, images: Tensor, labels: Tensor) -> EpochMetrics:
        losses, right, seen = [], 0, 0
        for batch, index in enumerate(self._batches(len(images)), start=1):
            distorted = augment(images[index], self.generator, strength=self.config.augment_strength)
            loss, logits, upright = self._loss(distorted, labels[index])
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} in epoch {epoch}, batch {batch}; lower train.learning_rate"
                )
            self._step(loss)
            losses.append(loss.item())
            right += int((logits.argmax(dim=1) == labels[index][upright]).sum())
            seen += int(upright.sum())
        rate = self.schedule.get_last_lr()[0]
        return EpochMetrics(
            epoch=epoch, loss=sum(losses) / len(losses), accuracy=right / max(seen, 1), learning_rate=rate
        )

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Full batches of indices in random order; the rest has its turn in another epoch."""
        order = torch.randperm(count, generator=self.generator)
        size = self.config.batch_size
        return (order[start : start + size] for start in range(0, count - size + 1, size))

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the upright images' logits, and which images are upright [B]."""
        turns = self._draw_turns(len(images))
        images = quarter_turns(images, turns)
        upright = turns == 0
        features = self.model.forward_features(images)  # [B, D]
        logits = self.model.head(features[upright])
        loss = self._upright_loss(logits, images[upright], labels[upright])
        if self.config.turned_share:
            turned_labels = labels * NUM_TURNS + turns
            smoothing = self.config.label_smoothing
            loss = loss + F.cross_entropy(self.turned_head(features), turned_labels, label_smoothing=smoothing)
        return loss, logits, upright

    def _upright_loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        if self.teacher is None or self.distill is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        return self.distill.loss(logits, teacher_logits, labels)

    def _draw_turns(self, count: int) -> Tensor:
        turns = torch.randint(1, NUM_TURNS, (count,), generator=self.generator)
        turned = torch.rand(count, generator=self.generator) < self.config.turned_share
        turned[0] = False  # a batch without an upright image would have no loss
        return turns * turned

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Weights decay; biases, norms and scales, which have one dimension, do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _lr_factor(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seed PyTorch and allow only deterministic operations; both are as before afterwards."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
