"""Check GCAB's claims by small trainings on scikit-learn's digits: four tasks, learned one after another in seconds.

The encoder learns with the first task and is frozen then: its drift needs the projectors of Cotogni et al. 2025
(arXiv:2211.12292), and what is left is the gated block's own doing. Loss and lambda_GCAB are theirs; batches, steps and
widths are as small as the data.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.claim_findings import CHANGED, NUM_SEEDS, Finding, judged
from bench.probes import digits, relative_error
from host.models.gated_attention import GatedClassAttentionBlock, annealed_scale
from host.models.gcab import GatedViT

TASKS = (4, 2, 2, 2)
"""Digits 0 to 3, 4 and 5, 6 and 7, 8 and 9."""
NUM_TRAIN = 1300
"""Images; the last 497 are the test."""
EPOCHS = 30
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 32, 2e-3, 1e-6
RESERVE_WEIGHT = 0.05
"""lambda_GCAB."""
MUCH_HIGHER = 0.2
"""Claim 4, of accuracy, with every seed."""
FORGOTTEN = 0.02
"""Claim 4: the largest drop of an old task's accuracy that is none; its gates become binary when the next one starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What became of `TASKS`, learned in turn.

    Attributes:
        reserved: share of the block's parameters after each task.
        learned: test accuracy of each task among its own classes, when it had just been learned.
        task_aware: the same, after the last task.
        task_agnostic: test accuracy among all classes, after the last task.
    """

    reserved: Sequence[float]
    learned: Sequence[float]
    task_aware: Sequence[float]
    task_agnostic: float


def check_zero_forgetting() -> Finding:
    """Claim 1, under a weight decay that moves whatever is not held."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, test_images = _small_model(), digits()[0][NUM_TRAIN:]
        learn_newest_task(model, epochs=1)
        _next_task(model)
        before, weights = model.eval()(test_images).detach(), copy.deepcopy(model.class_block.state_dict())
        learn_newest_task(model, epochs=1, weight_decay=0.5)
        after = model(test_images).detach()
    old = TASKS[0]
    pairs = [(weights[f"{name}.weight"], model.class_block.get_parameter(f"{name}.weight")) for name in ("q", "fc1")]
    moved = torch.cat([(a != b).flatten() for a, b in pairs]).float().mean()
    learned = relative_error(after[:, old:], before[:, old:])
    figure = (
        f"task 1's logits change by {float((after - before)[:, :old].abs().max()):g} while task 2's change by "
        f"{learned:.0%}; {moved:.0%} of the block's weights moved"
    )
    return judged(torch.equal(after[:, :old], before[:, :old]) and learned > CHANGED, figure)


def check_capacity() -> Finding:
    """Claim 3: without its loss the block fills up earlier, and the last task is learned less well, with every seed."""
    weighted, without = ([learn_tasks(weight, seed) for seed in range(NUM_SEEDS)] for weight in (RESERVE_WEIGHT, 0.0))
    assert all(list(run.reserved) == sorted(run.reserved) for run in weighted + without)  # a union cannot shrink
    pairs = [*zip(weighted, without, strict=True)]
    why = []
    if not all(a < b for ours, theirs in pairs for a, b in zip(ours.reserved, theirs.reserved, strict=True)):
        why.append("without the loss a task reserves no more")
    if not all(theirs.learned[-1] < ours.learned[-1] for ours, theirs in pairs):
        free = min(1 - run.reserved[-1] for run in without)
        why.append(f"without the loss the last task is learned as well, with some seed: {free:.0%} are still free")
    figure = f"lambda {RESERVE_WEIGHT}: {_describe(weighted)}; lambda 0: {_describe(without)}; {NUM_SEEDS} seeds"
    return judged(not why, figure, "; ".join(why))


def _describe(runs: Sequence[Lessons]) -> str:
    """Means over seeds."""
    shares = (mean(column) for column in zip(*(run.reserved for run in runs), strict=True))
    last = mean(run.learned[-1] for run in runs)
    return f"reserved {', '.join(f'{share:.0%}' for share in shares)} after tasks 1 to {len(TASKS)}, accuracy of the last {last:.3f}"


def check_calibration() -> Finding:
    """Claim 4: the gap is one between tasks, since nothing is forgotten."""
    runs = [learn_tasks(RESERVE_WEIGHT, seed) for seed in range(NUM_SEEDS)]
    gaps = [mean(run.task_aware) - run.task_agnostic for run in runs]
    forgotten = max(a - b for run in runs for a, b in zip(run.learned, run.task_aware, strict=True))
    figure = (
        f"accuracy {mean(mean(run.task_aware) for run in runs):.3f} with the task known, "
        f"{mean(run.task_agnostic for run in runs):.3f} without, smallest gap {min(gaps):.3f} (at least {MUCH_HIGHER}); "
        f"an old task loses at most {forgotten:.3f}; {NUM_SEEDS} seeds"
    )
    return judged(
        min(gaps) > MUCH_HIGHER and forgotten <= FORGOTTEN, figure, "the gap is small, or tasks are forgotten"
    )


@cache
def learn_tasks(reserve_weight: float, seed: int) -> Lessons:
    """Train a small model task by task."""
    reserved, learned = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _small_model()
        for task in range(len(TASKS)):
            if task:
                _next_task(model)
            learn_newest_task(model, epochs=EPOCHS, reserve_weight=reserve_weight)
            reserved.append(model.class_block.reserved_fraction(task + 1))
            learned.append(task_accuracy(model, task))
    task_aware = [task_accuracy(model, task) for task in range(len(TASKS))]
    images, labels = digits()
    with torch.no_grad():
        task_agnostic = (model(images[NUM_TRAIN:]).argmax(dim=1) == labels[NUM_TRAIN:]).float().mean().item()
    return Lessons(reserved=reserved, learned=learned, task_aware=task_aware, task_agnostic=task_agnostic)


def learn_newest_task(
    model: GatedViT, *, epochs: int, reserve_weight: float = RESERVE_WEIGHT, weight_decay: float = WEIGHT_DECAY
) -> None:
    """Train what is not frozen on the newest task's digits; leave in evaluation mode."""
    images, labels = _task_digits(len(model.tasks) - 1, slice(None, NUM_TRAIN))
    block, targets = model.class_block, F.one_hot(labels, model.tasks[-1]).float()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=weight_decay)
    model.train()
    for _ in range(epochs):
        batches = torch.randperm(len(images)).split(BATCH_SIZE)
        for step, batch in enumerate(batches, start=1):
            block.gate_scale = annealed_scale(step, len(batches))
            optimizer.zero_grad()
            logits = newest_logits(model, images[batch])
            # the mean over the logits of all tasks; those of old tasks are frozen and add a constant
            loss = F.binary_cross_entropy_with_logits(logits, targets[batch], reduction="sum")
            loss = loss / (len(batch) * sum(model.tasks)) + reserve_weight * newly_reserved(block)
            loss.backward()
            block.mask_gradients()
            block.compensate_gradients()
            with block.reserved_held():
                optimizer.step()
    model.eval()


def newest_logits(model: GatedViT, images: Tensor) -> Tensor:
    """The newest task's logits alone."""
    return task_logits(model, images, len(model.tasks) - 1)


def task_logits(model: GatedViT, images: Tensor, task: int) -> Tensor:
    return model.head.tasks[task](model.class_attention(model.forward_tokens(images), task))


def newly_reserved(block: GatedClassAttentionBlock) -> Tensor:
    """The mean of the newest gates over units that no older task uses."""
    free = [1 - mask for mask in block.cumulative_masks()]
    gates = block.gates(block.num_tasks - 1)
    return sum((gate * mask).sum() for gate, mask in zip(gates, free, strict=True)) / sum(mask.sum() for mask in free)


@torch.no_grad()
def task_accuracy(model: GatedViT, task: int) -> float:
    """Share of a task's test digits named rightly among the classes of the task."""
    images, labels = _task_digits(task, slice(NUM_TRAIN, None))
    return (task_logits(model, images, task).argmax(dim=1) == labels).float().mean().item()


def _task_digits(task: int, part: slice) -> tuple[Tensor, Tensor]:
    """Images of a task, and labels counted within it."""
    images, labels = (values[part] for values in digits())
    first = sum(TASKS[:task])
    wanted = (labels >= first) & (labels < first + TASKS[task])
    return images[wanted], labels[wanted] - first


def _small_model() -> GatedViT:
    layout = {"image_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 4}
    return GatedViT(tasks=TASKS[:1], drop_path=0.0, **layout)


def _next_task(model: GatedViT) -> None:
    model.add_task(TASKS[len(model.tasks)])
    model.encoder.requires_grad_(False)
