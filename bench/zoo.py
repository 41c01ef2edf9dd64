"""Train the checkpoints that ship in `host/zoo`, one small variant of every family; write the table `zoo`.

    python -m bench.zoo [--workers N] [--only PART_OF_A_NAME]

Reads `cifar10_jpeg75.npz` and `tiny_imagenet100.npz` from the folder FIELDVIT_DATA, else from `../shared/data` beside the
repository. Resumable: finished rows stay, and a training that was stopped goes on from its checkpoint
(`bench/results/unfinished`, not in the repository).

One recipe for all: AdamW, cosine, moving average of the weights, random crop and flip, labels smoothed, nothing tuned for
one of them; the last epoch counts, and no choice is made on the test images. Accuracy is that of the file as it ships,
its weights rounded to float16. Training uses bfloat16 autocast on one thread.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from bench.jobs import Job, Table, digest, main_of
from bench.record import RESULTS, Row
from device.contract.manifest import InputSpec
from host.data.sources import load_splits
from host.data.spec import DataSpec
from host.data.splits import ImageSplits
from host.models.options import build_model
from host.models.registry import find_model
from host.stages.data import base_test_images
from host.stages.features import over_images, torch_logits
from host.training.config import TrainConfig
from host.training.loop import train
from host.training.objective import CrossEntropy
from host.zoo.cards import Card
from host.zoo.save import save_checkpoint

UNFINISHED = RESULTS / "unfinished"
SEED = 0
RECIPE_VERSION = 1
"""Raise when training changes in effect: everything is trained again."""
CIFAR, TINY = "cifar10-jpeg75", "tiny-imagenet100"
SPECS = {
    CIFAR: DataSpec(source=CIFAR, validation_share=0.02),
    TINY: DataSpec(source=TINY, validation_share=0.02),
    "tiny-imagenet50": DataSpec(source=TINY, validation_share=0.02, held_back=("50..99",)),
}
CONFIG = TrainConfig(
    epochs=30,
    batch_size=128,
    learning_rate=1.5e-3,
    warmup_share=0.1,
    weight_decay=0.05,
    max_grad_norm=1.0,
    ema_decay=0.998,
    precision="bfloat16",
    crop="pad",
    flip=0.5,
    erasing=0.1,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One checkpoint."""

    family: str
    variant: str
    data: str
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}-{self.data.split('-jpeg')[0]}"


PLANS = (
    Plan("mobileformer", "field-32", CIFAR, 40),
    Plan("efficientformer", "field-32", CIFAR, 40),
    Plan("mobilevitv2", "field-32", CIFAR, 30),
    Plan("mobilevit", "field-32", CIFAR, 30),
    Plan("nextvit", "field-32", CIFAR, 30),
    Plan("ninformer", "field-32", CIFAR, 30),
    Plan("gcab", "field-32", CIFAR, 30),
    Plan("deit", "field-32", CIFAR, 40),
    Plan("efficientformerv2", "field-64", TINY, 40),
    Plan("nextvit", "field-64", TINY, 40),
    Plan("efficientformer", "field-64", TINY, 40),
    Plan("nextvit", "field-64", "tiny-imagenet50", 40),
)


def main(argv: Sequence[str] | None = None) -> int:
    table = Table(
        name="zoo",
        command="make evidence-zoo",
        seed=SEED,
        data="CIFAR-10 as JPEG copies of quality 75, and 100 classes of Tiny-ImageNet",
        title="Checkpoints that ship",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv, prepare=lambda: [_splits(data) for data in SPECS])


def list_jobs() -> list[Job]:
    """One per checkpoint."""
    return [
        Job(
            key={"name": plan.name, "model": f"{plan.family}/{plan.variant}", "data": plan.data},
            settings={
                "version": RECIPE_VERSION,
                "epochs": plan.epochs,
                **_settings(),
                "data": asdict(SPECS[plan.data]),
            },
            defined_by=_behaviour(plan.family, plan.variant),
        )
        for plan in PLANS
    ]


def _settings() -> dict[str, Any]:
    return {name: value for name, value in asdict(CONFIG).items() if name not in ("epochs", "workers")}


@cache
def _behaviour(family: str, variant: str) -> str:
    """Digest of what a model computes in float64, to 4 digits: rewriting its code leaves it, another function does not."""
    network = _build(family, variant, num_classes=10).double().eval()
    size = find_model(family, variant).image_size
    images = torch.linspace(-1, 1, math.prod((2, 3, size, size)), dtype=torch.float64).reshape(2, 3, size, size)
    with torch.no_grad():
        return digest([f"{value:.3e}" for value in network(images.sin_()).flatten().tolist()])


def _build(family: str, variant: str, *, num_classes: int) -> nn.Module:
    return build_model(find_model(family, variant), num_classes=num_classes, in_chans=3, seed=SEED)


@cache
def _splits(data: str) -> ImageSplits:
    return load_splits(SPECS[data], seed=SEED)


def measure(job: Job) -> Row:
    """Train one model, write its checkpoint, and test what was written."""
    torch.set_num_threads(1)
    plan = next(plan for plan in PLANS if plan.name == job.key["name"])
    splits, entry = _splits(plan.data), find_model(plan.family, plan.variant)
    size = entry.image_size
    spec = InputSpec(height=size, width=size, channels=3, mean=entry.mean, std=entry.std, color_order="rgb")
    config = TrainConfig(**{**_settings(), "epochs": plan.epochs})
    model = _build(plan.family, plan.variant, num_classes=splits.num_base)
    checkpoint = UNFINISHED / f"{job.recipe}.safetensors"
    UNFINISHED.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    metrics = train(
        CrossEntropy(model, label_smoothing=config.label_smoothing),
        splits.train,
        spec,
        config,
        seed=SEED,
        checkpoint=checkpoint,
    )
    model.half().float()
    test = base_test_images(splits)
    accuracy = float((over_images(torch_logits(model), test.images, spec).argmax(axis=1) == test.labels).mean())
    card = Card(
        name=plan.name,
        family=plan.family,
        variant=plan.variant,
        labels=splits.base_names,
        data=SPECS[plan.data],
        seed=SEED,
        description=splits.description,
        terms=splits.terms,
        recipe=job.recipe,
        epochs=plan.epochs,
        test_accuracy=round(accuracy, 4),
        test_images=len(test),
    )
    path = save_checkpoint(model, card)
    checkpoint.unlink(missing_ok=True)
    return {
        "classes": splits.num_base,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": plan.epochs,
        "test_accuracy": round(accuracy, 4),
        "train_loss": round(metrics[-1].loss, 4),
        "file_kb": round(path.stat().st_size / 1e3),
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
    }


def _notes(rows: Sequence[Mapping[str, Any]]) -> str:
    total = sum(row["file_kb"] for row in rows)
    return (
        f"`test_accuracy` is a share of all test images of the classes, of the float16 file. All files together have "
        f"{total / 1e3:.1f} MB. `cpu_minutes` is time of one core since the training was last started."
    )


if __name__ == "__main__":
    sys.exit(main())
