"""The training loop: batches, optimizer, schedule, moving average, checkpoints, on one process or several.

Same machine, same seed, same number of threads: the same weights, bit for bit, also when the run was killed on the way
and started again. Every step seeds its own randomness with (seed, step, process), so a checkpoint needs no random state.

Several processes compute what one would with the same `batch_size`, but for what belongs to one process's images:
statistics of batch norms (rank 0's are kept), dropout and mixing.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import host.models  # noqa: F401  # repairs torchvision, which timm imports

# isort: split
import numpy as np
import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils import deterministic as torch_deterministic

from device.contract.manifest import InputSpec
from host.data.splits import LabeledImages
from host.errors import TrainingError
from host.training.batches import EpochBatches, TrainingImages, make_loader, seed_all
from host.training.checkpoint import State, load_state, save_state
from host.training.config import TrainConfig
from host.training.engine import is_connection_lost, make_engine
from host.training.objective import Objective
from host.training.optimizers import make_optimizer
from host.training.sam import climb, frozen_statistics, restore
from host.training.schedule import learning_rate
from host.training.transforms import BatchAugmentation

CHECKPOINT_INTERVAL_S = 120.0
"""A run that is killed loses at most this much, or one step."""

Validate = Callable[[nn.Module, int], Mapping[str, float]]
"""Figures of a model, given in evaluation mode, after an epoch, counted from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch, counted from 1: mean loss of its batches, share of its images answered right, what was validated."""

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    validation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a run tells while it goes on; all on rank 0 only.

    Attributes:
        on_step: called with steps done, all steps, and the loss of the step before.
        on_epoch: called after every epoch; after a resumption with the epochs before it too.
        validate: figures that go into `EpochMetrics.validation`.
    """

    on_step: Callable[[int, int, float], None] = lambda done, total, loss: None
    on_epoch: Callable[[EpochMetrics], None] = lambda metrics: None
    validate: Validate | None = None


def train(
    objective: Objective,
    images: LabeledImages,
    spec: InputSpec,
    config: TrainConfig,
    *,
    seed: int,
    engine: Fabric | None = None,
    checkpoint: Path | None = None,
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S,
    hooks: Hooks | None = None,
) -> list[EpochMetrics]:
    """Train `objective.model` in place and leave it in evaluation mode, with its moving average where one is kept.

    Args:
        objective: the model and its loss.
        images: to train on.
        spec: the model's input.
        config: how to train.
        seed: of batches, augmentation, dropout, and of what the objective draws.
        engine: the processes; None joins those of `torchrun`, or is one process.
        checkpoint: file to go on from where it is of this very run, and to write to; None keeps nothing.
        checkpoint_interval_s: seconds between two writings, beside the one at the end.
        hooks: what to tell.

    Raises:
        TrainingError: fewer images than a batch, mixing with a loss that cannot take it, a loss or weights that are not
            finite, or another process that ended.
    """
    if config.is_mixing and not objective.takes_mixed:
        raise TrainingError(f"{type(objective).__name__} cannot take mixed images; set train.mixup and cutmix to 0")
    engine = engine or make_engine(config.precision)
    with _deterministic():
        run = _Run(objective, images, spec, config, engine, seed=seed, hooks=hooks or Hooks())
        keeper = _Keeper(run, checkpoint, checkpoint_interval_s)
        try:
            metrics = run.to_the_end(keeper)
        except RuntimeError as error:
            if engine.world_size > 1 and is_connection_lost(error):
                raise TrainingError(
                    "another process of this run has ended; its own message says why: start the same command again to go on"
                ) from error
            raise
    run.finish()
    return metrics


@dataclass(slots=True)
class _Sums:
    """Of the epoch under way, over the images of this process."""

    loss: float = 0.0
    batches: int = 0
    right: int = 0
    seen: int = 0


class _Run:
    """What lasts from step to step."""

    def __init__(
        self,
        objective: Objective,
        images: LabeledImages,
        spec: InputSpec,
        config: TrainConfig,
        engine: Fabric,
        *,
        seed: int,
        hooks: Hooks,
    ) -> None:
        self.objective, self.config, self.engine, self.seed, self.hooks = objective, config, engine, seed, hooks
        rank, world_size = engine.global_rank, engine.world_size
        self.batches = EpochBatches(images, config, seed=seed, rank=rank, world_size=world_size)
        self.loader = make_loader(TrainingImages(images, spec, config, seed=seed), self.batches, workers=config.workers)
        self.module, self.optimizer = engine.setup(objective, make_optimizer(objective, config))
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        num_classes = objective.model.head.out_features
        self.augment = BatchAugmentation(config, num_classes=num_classes, torch_device=engine.device)
        self.average = ModelEmaV3(objective.model, decay=config.ema_decay) if config.ema_decay else None
        self.steps = config.epochs * self.batches.steps
        self.step = 0
        self.sums = _Sums()
        self.metrics: list[EpochMetrics] = []
        self.recipe = _digest(objective, images, spec, config, seed)

    def to_the_end(self, keeper: "_Keeper") -> list[EpochMetrics]:
        keeper.restore()
        for metrics in self.metrics:
            self._tell_epoch(metrics)
        while self.step < self.steps:
            self._epoch(1 + self.step // self.batches.steps, keeper)
        keeper.save()
        return self.metrics

    def _epoch(self, epoch: int, keeper: "_Keeper") -> None:
        self.batches.epoch, self.batches.first_step = epoch, self.step % self.batches.steps
        self.objective.train()
        self.objective.start_epoch(epoch, self.config.epochs)
        parts: list[tuple[Tensor, Tensor]] = []
        for images, labels in self.loader:
            parts.append((images.to(self.engine.device), labels.to(self.engine.device)))
            if len(parts) == self.config.accumulate:
                self._step(epoch, parts)
                parts = []
                if self.step % self.batches.steps:
                    keeper.save_if_due()
        self._end_epoch(epoch)
        keeper.save_if_due()

    def _step(self, epoch: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        """One step of the optimizer on this process's parts of a batch."""
        rate = learning_rate(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed_all(self.seed, self.step, self.engine.global_rank)
        batch = [(*self.augment(images, labels, epoch=epoch), labels) for images, labels in parts]
        loss = self._gradients(epoch, batch, counts=True)
        if self.config.sam_radius:
            before = climb(self.parameters, self.config.sam_radius)
            seed_all(self.seed, self.step, self.engine.global_rank)
            with frozen_statistics(self.objective):
                self._gradients(epoch, batch, counts=False)
            restore(self.parameters, before)
        if self.config.max_grad_norm:
            self.engine.clip_gradients(
                self.module, self.optimizer, max_norm=self.config.max_grad_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        if self.average:
            self.average.update(self.objective.model)
        self.step += 1
        self.sums.loss += loss
        self.sums.batches += 1
        if self.engine.is_global_zero:
            self.hooks.on_step(self.step, self.steps, loss)

    def _gradients(self, epoch: int, batch: list[tuple[Tensor, Tensor | None, Tensor]], *, counts: bool) -> float:
        """Leave the gradients of the mean loss in the weights; returns that loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for number, (images, targets, labels) in enumerate(batch, start=1):
            with self.engine.no_backward_sync(self.module, enabled=number < len(batch)):
                outcome = self.module(images, labels, targets)
                self.engine.backward(outcome.loss / len(batch))
            total += outcome.loss.item()
            if counts:
                self.sums.right += int((outcome.logits.argmax(dim=1) == outcome.labels).sum())
                self.sums.seen += len(outcome.labels)
        loss = self._mean_over_processes(total / len(batch))
        if not math.isfinite(loss):
            at = 1 + self.step % self.batches.steps
            raise TrainingError(
                f"the loss is {loss} in epoch {epoch}, batch {at} (step {self.step + 1}); the last checkpoint is kept: "
                "lower train.learning_rate, or set train.max_grad_norm"
            )
        return loss

    def _mean_over_processes(self, value: float) -> float:
        """So that all processes stop at the same loss that is not finite, and rank 0 tells the loss of the whole batch."""
        if self.engine.world_size == 1:
            return value
        return self.engine.all_reduce(torch.tensor(value, device=self.engine.device)).item()

    def _end_epoch(self, epoch: int) -> None:
        sums = self.engine.to_device(torch.tensor(list(asdict(self.sums).values()), dtype=torch.float64))
        loss, batches, right, seen = self.engine.all_reduce(sums, reduce_op="sum").tolist()
        self.sums = _Sums()
        metrics = EpochMetrics(
            epoch=epoch,
            loss=loss / batches,
            accuracy=right / max(seen, 1),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            validation=self._validate(epoch),
        )
        self.metrics.append(metrics)
        self._tell_epoch(metrics)

    def _validate(self, epoch: int) -> dict[str, float]:
        if self.hooks.validate is None or not self.engine.is_global_zero:
            return {}
        model = self.average.module if self.average else self.objective.model
        with torch.no_grad():
            return dict(self.hooks.validate(_evaluating(model), epoch))

    def _tell_epoch(self, metrics: EpochMetrics) -> None:
        if self.engine.is_global_zero:
            self.hooks.on_epoch(metrics)

    def state(self) -> State:
        weights = dict(self.objective.state_dict())
        if self.average:
            weights |= {f"ema.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        return State(
            step=self.step,
            weights=weights,
            optimizer=self.optimizer.state_dict(),
            scaler=self.engine.strategy.precision.state_dict(),
            records={"metrics": [asdict(metrics) for metrics in self.metrics], "sums": asdict(self.sums)},
            recipe=self.recipe,
        )

    def load(self, state: State) -> None:
        average = {n.removeprefix("ema."): t for n, t in state.weights.items() if n.startswith("ema.")}
        self.objective.load_state_dict({n: t for n, t in state.weights.items() if not n.startswith("ema.")})
        if self.average:
            self.average.module.load_state_dict(average)
        self.optimizer.optimizer.load_state_dict(dict(state.optimizer))
        if state.scaler:
            self.engine.strategy.precision.load_state_dict(dict(state.scaler))
        self.step = state.step
        self.metrics = [EpochMetrics(**entry) for entry in state.records["metrics"]]
        self.sums = _Sums(**state.records["sums"]) if self.engine.is_global_zero else _Sums()

    def finish(self) -> None:
        """Leave the moving average in the model, where there is one, and evaluation mode."""
        if self.average:
            self.objective.model.load_state_dict(self.average.module.state_dict())
        _evaluating(self.objective)


class _Keeper:
    """Writes checkpoints on rank 0, and gives all processes the one to go on from."""

    def __init__(self, run: _Run, path: Path | None, interval_s: float) -> None:
        self.run, self.path, self.interval_s = run, path, interval_s
        self.last = time.monotonic()

    def restore(self) -> None:
        if self.path is None:
            return
        state = load_state(self.path, recipe=self.run.recipe) if self.run.engine.is_global_zero else None
        state = self.run.engine.broadcast(state)
        if state is not None:
            self.run.load(state)

    def save_if_due(self) -> None:
        if time.monotonic() - self.last >= self.interval_s:
            self.save()

    def save(self) -> None:
        if self.path is not None and self.run.engine.is_global_zero:
            save_state(self.run.state(), self.path)
        self.last = time.monotonic()


def _evaluating(module: nn.Module) -> nn.Module:
    """In evaluation mode, without what some of timm's modules keep of weights they had in that mode before."""
    return module.train().eval()


def _digest(objective: Objective, images: LabeledImages, spec: InputSpec, config: TrainConfig, seed: int) -> str:
    """What a checkpoint must be of to go on from it: these weights, labels, input and settings."""
    shapes = {name: list(tensor.shape) for name, tensor in objective.state_dict().items()}
    labels = hashlib.sha256(images.labels.tobytes()).hexdigest()
    settings = {name: value for name, value in asdict(config).items() if name != "workers"}
    record = [type(objective).__name__, shapes, labels, asdict(spec), settings, seed]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Allow only deterministic operations, and put the random states back afterwards."""
    was_deterministic, was_filling = (
        torch.are_deterministic_algorithms_enabled(),
        torch_deterministic.fill_uninitialized_memory,
    )
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        torch_deterministic.fill_uninitialized_memory = False  # a costly aid against reading what nobody wrote
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
            torch_deterministic.fill_uninitialized_memory = was_filling
            random.setstate(python_state)
            np.random.set_state(numpy_state)
