"""Time a training step of `host.training` against a plain loop of timm's own parts; write `training_throughput`.

    python -m bench.training_throughput [--rounds N]

Reads `cifar10_jpeg75.npz` from the folder FIELDVIT_DATA, else from `../shared/data` beside the repository. Both loops
train the same model on the same decoded images, in the same order of magnitude of everything: crop to 25..100 % of the
area, flip, RandAugment, erasing, mixup, AdamW, gradients clipped, moving average of the weights, one thread, images
loaded between the steps. timm's loop has its `create_loader` with prefetcher and mixing while collating, its
`create_optimizer_v2`, `dispatch_clip_grad`, `ModelEmaV3` and, as its script does, a `NativeScaler` with float16 only, which
a CPU does not train. The loops take turns, a few steps at a time, so a slow moment of the machine is shared. Times are
those of the processor: on an idle machine they equal a clock's, and on a shared one they leave out waiting for others.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import geometric_mean, median
from typing import Any

import host.models  # noqa: F401  # repairs torchvision, which timm imports

# isort: split
import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch.utils.data import Dataset

from bench.record import Row, write_results
from device.contract.manifest import InputSpec
from host.data.sources import load_splits
from host.data.spec import DataSpec
from host.data.splits import LabeledImages
from host.errors import HostError
from host.models.registry import create_model
from host.training.config import TrainConfig
from host.training.loop import Hooks, train
from host.training.objective import CrossEntropy

MODELS = (("mobilevit", "field-32"), ("nextvit", "field-32"), ("deit", "field-32"))
BATCH_SIZE = 128
STEPS = 12
"""Of a loop's turn; the first two do not count."""
WARM_UP = 2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
SPEC = InputSpec(height=32, width=32, channels=3, mean=MEAN, std=STD, color_order="rgb")
CONFIG = TrainConfig(
    epochs=1,
    batch_size=BATCH_SIZE,
    learning_rate=1e-3,
    max_grad_norm=1.0,
    ema_decay=0.999,
    crop="resized",
    flip=0.5,
    rand_augment="rand-m7-mstd0.5-inc1",  # at m9 timm's own posterizes to 0 bits at times, which Pillow 13 refuses
    erasing=0.25,
    mixup=0.8,
)


class PillowImages(Dataset):
    """The images as timm's loader takes them; it sets `transform`."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, images: LabeledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images.images[index])), int(self.images.labels[index])


def time_ours(name: tuple[str, str], images: LabeledImages, config: TrainConfig) -> list[float]:
    """Processor seconds of each step."""
    model = create_model(*name, num_classes=10, in_chans=3)
    times = [time.process_time()]
    hooks = Hooks(on_step=lambda done, total, loss: times.append(time.process_time()))
    train(CrossEntropy(model), images, SPEC, config, seed=0, hooks=hooks)
    return list(np.diff(times))[WARM_UP:]


def time_timm(name: tuple[str, str], images: LabeledImages, config: TrainConfig) -> list[float]:
    """Processor seconds of each step."""
    model = create_model(*name, num_classes=10, in_chans=3).train()
    loader = _timm_loader(images, config)
    optimizer = create_optimizer_v2(model, "adamw", lr=config.learning_rate, weight_decay=config.weight_decay)
    average = ModelEmaV3(model, decay=config.ema_decay)
    loss_of = SoftTargetCrossEntropy()
    times = [time.process_time()]
    for inputs, targets in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = loss_of(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), config.max_grad_norm)
        optimizer.step()
        average.update(model)
        loss.item()  # as ours: a loss that is not finite must stop the run
        times.append(time.process_time())
    return list(np.diff(times))[WARM_UP:]


def _timm_loader(images: LabeledImages, config: TrainConfig) -> Any:
    mixing = FastCollateMixup(mixup_alpha=config.mixup, label_smoothing=config.label_smoothing, num_classes=10)
    return create_loader(
        PillowImages(images),
        input_size=(3, 32, 32),
        batch_size=config.batch_size,
        is_training=True,
        scale=(0.25, 1.0),
        hflip=config.flip,
        auto_augment=config.rand_augment,
        re_prob=config.erasing,
        re_mode="pixel",
        mean=MEAN,
        std=STD,
        num_workers=0,
        persistent_workers=False,
        collate_fn=mixing,
        device=torch.device("cpu"),
    )


def measure(name: tuple[str, str], precision: str, images: LabeledImages, rounds: int) -> Row:
    """Both loops in turn; the ratio is that of timm's median step to ours, so above 1 ours is faster."""
    config = replace(CONFIG, precision=precision)
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(rounds):
        order: Iterator = iter([(time_ours, ours), (time_timm, theirs)][:: 1 if turn % 2 else -1])
        for run, times in order:
            times += run(name, images, config)
    return {
        "model": "/".join(name),
        "precision": precision,
        "steps": len(ours),
        "images_per_s": round(BATCH_SIZE / median(ours), 1),
        "timm_images_per_s": round(BATCH_SIZE / median(theirs), 1),
        "ratio": round(median(theirs) / median(ours), 3),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training_throughput", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="turns of each loop")
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    try:
        images = load_splits(DataSpec(source="cifar10-jpeg75"), seed=0).train.take(np.arange(STEPS * BATCH_SIZE))
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    decoded = LabeledImages(images=np.stack([images.images[i] for i in range(len(images))]), labels=images.labels)
    rows = [measure(name, precision, decoded, rounds) for name in MODELS for precision in ("float32", "bfloat16")]
    write_results(
        "training_throughput",
        command="make evidence-training_throughput",
        seed=0,
        data=f"CIFAR-10 as JPEG copies of quality 75, decoded: {len(decoded)} images of 32 x 32",
        rows=rows,
        title="A training step, against a plain loop of timm's parts",
        notes="Medians over steps of processor time, the loops in turn, one thread. `ratio` is ours to timm's in images per "
        f"second; its geometric mean is {geometric_mean([row['ratio'] for row in rows]):.3f}.",
    )
    for row in rows:
        print(f"{row['model']:28} {row['precision']:9} {row['images_per_s']:8.1f} images/s   {row['ratio']:.3f} x timm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
