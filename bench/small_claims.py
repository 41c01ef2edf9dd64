"""Train three small comparisons that the specifications ask for; write the table `small_claims`.

    python -m bench.small_claims [--workers N] [--only PART_OF_A_LABEL]

- EfficientFormer, claim 4: pooling or a depthwise 3 x 3 convolution as the mixer of every MB4D, at equal depth.
- Next-ViT, claim 3: as it is; every NTB an NCB of the same width; every NCB of stage 2 an NTB of the same width. The
  latency ratio is that of the inference forms in LiteRT (float32, one thread), run in turn.
- MobileViT, claim 5: trained on pixels in 0..1, tested on those and on images with ImageNet's mean and deviation.

Reads `cifar10_jpeg75.npz` where `bench.ninformer_cifar10` does, and takes its images and augmentation. Resumable:
finished rows stay (`bench.jobs`). `bench.claims` judges the claims.

Recipe, the same for both sides of a comparison: AdamW (weight decay 0.025), one cycle up to 2e-3, batch 64, random
crop and flip, the first 10,000 training images; the last step counts. Batches, crops and flips depend on the seed alone.

Cost of one image in a training step, in milliseconds of CPU time of one core of an AMD EPYC (Zen 4), batch 64:

| | float32 | bfloat16 autocast | epochs |
|---|---|---|---|
| efficientformer/field-32 (batch 128) | 1.0 | 0.6 | 10, bfloat16 |
| nextvit/field-32 | 4.8 | 3.8 | 4, bfloat16 |
| mobilevit/field-32 | 6.2 | 9.1 | 2, float32 |
| mobilevitv2/field-32 | 5.7 | 5.7 | 2, float32 |

So all 21 trainings take about 50 minutes of CPU time; ten epochs of everything would take two hours or more.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.jobs import Job, Table, digest, main_of
from bench.latency_families import convert, interleaved, runner
from bench.ninformer_cifar10 import CIFAR, NUM_CLASSES, augment, data_file, load_images, normalize
from bench.record import Row
from host.models.efficientformer import MetaBlock2d
from host.models.measure import count_parameters
from host.models.nextvit import HEAD_DIM, NextConvBlock, NextTransformerBlock, NextViT
from host.models.registry import find_model

MIXER, HYBRID, PIXELS = "EfficientFormer 4", "Next-ViT 3", "MobileViT 5"
POOLING, CONVOLUTION = "pooling", "depthwise 3 x 3"
AS_IS, NO_ATTENTION, MORE_ATTENTION = "as it is", "every NTB an NCB", "every NCB of stage 2 an NTB"
SEEDS = (0, 1, 2)
IMAGE_SIZE, IN_CHANS = 32, 3

RECIPE: Mapping[str, Any] = {"version": 1, "images": 10_000, "batch_size": 64}
"""Raise the version when the training below changes in effect: everything is measured again."""
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.025
TRAINING: Mapping[str, Mapping[str, Any]] = {
    MIXER: {"epochs": 10, "is_half": True},
    HYBRID: {"epochs": 4, "is_half": True},
    PIXELS: {"epochs": 2, "is_half": False},
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_BATCH = 100


def with_convolution_mixers(model: nn.Module) -> nn.Module:
    """Depthwise 3 x 3 convolutions in the place of EfficientFormer's pooling, as in V2's ablation; changes `model`."""
    for block in model.modules():
        if isinstance(block, MetaBlock2d):
            width = len(block.ls1.gamma)
            block.token_mixer = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    return model


def with_attention_throughout(model: NextViT, stage_index: int) -> NextViT:
    """NTBs of the same width in the place of a stage's NCBs; changes `model`.

    All but one head's channels attend: 0.75 of the 96 channels in `field-32`, rounded up as timm does, would be all.
    """
    stage = model.stages[stage_index]
    like = next(block for block in stage.blocks if isinstance(block, NextTransformerBlock))
    for index, block in enumerate(stage.blocks):
        if isinstance(block, NextConvBlock):
            stage.blocks[index] = NextTransformerBlock(
                block.in_chs,
                block.out_chs,
                drop_path=block.mlp_drop_path.drop_prob,
                stride=2 if index == 0 and stage_index else 1,
                sr_ratio=like.e_mhsa.sr_ratio,
                head_dim=HEAD_DIM,
                mix_block_ratio=1 - HEAD_DIM / block.out_chs,
            ).apply(_initialize)
    return model


def _initialize(module: nn.Module) -> None:
    """As Next-ViT does with all its blocks."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _create(name: str, **options: Any) -> nn.Module:
    return find_model(*name.split("/")).create(num_classes=NUM_CLASSES, in_chans=IN_CHANS, **options)


BUILDERS: Mapping[tuple[str, str, str], Callable[[], nn.Module]] = {
    (MIXER, "efficientformer/field-32", POOLING): lambda: _create("efficientformer/field-32"),
    (MIXER, "efficientformer/field-32", CONVOLUTION): lambda: with_convolution_mixers(
        _create("efficientformer/field-32")
    ),
    (HYBRID, "nextvit/field-32", AS_IS): lambda: _create("nextvit/field-32"),
    (HYBRID, "nextvit/field-32", NO_ATTENTION): lambda: _create("nextvit/field-32", has_attention=False),
    (HYBRID, "nextvit/field-32", MORE_ATTENTION): lambda: with_attention_throughout(_create("nextvit/field-32"), 1),
    (PIXELS, "mobilevit/field-32", AS_IS): lambda: _create("mobilevit/field-32"),
    (PIXELS, "mobilevitv2/field-32", AS_IS): lambda: _create("mobilevitv2/field-32"),
}
"""By claim, model and variant, in the order of the table."""


def list_jobs() -> list[Job]:
    """All rows, seed by seed within each claim."""
    return [
        Job(
            key={"claim": claim, "model": model, "variant": variant, "seed": seed},
            settings={**RECIPE, **TRAINING[claim]},
            defined_by=_digest(claim, model, variant),
        )
        for wanted in TRAINING
        for seed in SEEDS
        for claim, model, variant in BUILDERS
        if claim == wanted
    ]


def build(claim: str, model: str, variant: str, *, seed: int) -> nn.Module:
    """A model with the weights that `seed` draws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BUILDERS[claim, model, variant]()


@cache
def _digest(claim: str, model: str, variant: str) -> str:
    """Of what the model computes in training and evaluation, to 4 digits: rewriting its code does not change it."""
    network = build(claim, model, variant, seed=0).double()
    shape = (2, IN_CHANS, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape).sin_()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # stochastic depth
        logits = torch.cat([network.train()(images), network.eval()(images)])
    return digest([f"{value:.3e}" for value in logits.flatten().tolist()])


def measure(job: Job) -> Row:
    """Train and test one model."""
    torch.set_num_threads(1)
    claim, seed, settings = job.key["claim"], job.key["seed"], job.settings
    variant = (claim, job.key["model"], job.key["variant"])
    images, labels, test_images, test_labels = load_images(CIFAR)
    scale = to_unit if claim == PIXELS else normalize
    start = time.process_time()
    model = build(*variant, seed=seed).to(memory_format=torch.channels_last)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # stochastic depth
        train(model, images[: settings["images"]], labels[: settings["images"]], settings, scale, seed=seed)
    row = {
        "parameters": count_parameters(model),
        "epochs": settings["epochs"],
        "images": settings["images"],
        "clean_accuracy": accuracy(model, test_images, test_labels, scale),
        "normalised_accuracy": None,
        "latency_ratio": None,
    }
    if claim == PIXELS:
        row["normalised_accuracy"] = accuracy(model, test_images, test_labels, to_imagenet)
    row["cpu_minutes"] = round((time.process_time() - start) / 60, 1)
    if claim == HYBRID and variant[2] != AS_IS and seed == SEEDS[0]:
        row["latency_ratio"] = round(latency_ratio(variant, (claim, variant[1], AS_IS)), 3)
    return row


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Mapping[str, Any],
    scale: Callable[[Tensor], Tensor],
    *,
    seed: int,
) -> None:
    """Train in place on images uint8 [N, C, H, W], scaled by `scale`; leave in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    steps = settings["epochs"] * math.ceil(len(images) / settings["batch_size"])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(settings["epochs"]):
        for batch in torch.randperm(len(images), generator=generator).split(settings["batch_size"]):
            x = scale(augment(images[batch], generator)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings["is_half"]):
                logits = model(x)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, scale: Callable[[Tensor], Tensor]) -> float:
    """Share of images uint8 [N, C, H, W] named rightly, in float32."""
    logits = torch.cat([model(scale(x)) for x in images.split(TEST_BATCH)])
    return (logits.argmax(dim=1) == labels).float().mean().item()


def to_unit(images: Tensor) -> Tensor:
    """0..255 to 0..1."""
    return images.float() / 255


def to_imagenet(images: Tensor) -> Tensor:
    """0..255 to ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (to_unit(images) - mean) / std


def latency_ratio(variant: tuple[str, str, str], peer: tuple[str, str, str]) -> float:
    """Median time of `variant` over that of `peer` in LiteRT, run in turn."""
    with tempfile.TemporaryDirectory() as directory:
        runners = {}
        for name, parts in {"variant": variant, "peer": peer}.items():
            path = Path(directory) / f"{name}.tflite"
            convert(build(*parts, seed=0).deploy(), IMAGE_SIZE, IN_CHANS, path)
            runners[name] = runner(path)
        times = interleaved(runners)
    return times["variant"] / times["peer"]


def by_seed(rows: Sequence[Row], column: str = "clean_accuracy", **wanted: Any) -> dict[int, Any]:
    """A column of the rows that hold all that is `wanted`, by seed."""
    return {row["seed"]: row[column] for row in rows if wanted.items() <= row.items()}


def paired_gaps(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours less theirs, per seed that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds; of a single seed no deviation."""
    if not values:
        return "–"
    return f"{mean(values):{sign}.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def summarize(rows: Sequence[Row]) -> str:
    """The notes of the table: means over the seeds and gaps paired by seed."""
    lines = [
        "| claim | model | variant | seeds | clean accuracy | gap to the first variant | normalised accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim, model, variant in BUILDERS:
        key = {"claim": claim, "model": model, "variant": variant}
        first = {**key, "variant": next(v for c, m, v in BUILDERS if (c, m) == (claim, model))}
        clean, normalised = by_seed(rows, **key), by_seed(rows, "normalised_accuracy", **key)
        gap = spread(paired_gaps(clean, by_seed(rows, **first)), "+") if key != first else "–"
        wrong = spread([value for value in normalised.values() if value is not None])
        cells = (claim, model, variant, len(clean), spread([*clean.values()]), gap, wrong)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    growth = _create_on_meta(MIXER, CONVOLUTION) / _create_on_meta(MIXER, POOLING) - 1
    return "\n\n".join(
        [
            f"Shares in 0..1; mean ± standard deviation over the seeds; gaps are paired by seed. {len(rows)} of "
            f"{len(BUILDERS) * len(SEEDS)} trainings are measured with the present recipe. Convolution mixers add "
            f"{growth:.2%} parameters to efficientformer/field-32. NCB and NTB of one width differ in parameters, too. "
            "`normalised_accuracy`: the same weights, tested on images with ImageNet's mean and deviation. "
            "`latency_ratio`: to Next-ViT as it is, run in turn with it. A few epochs on 10,000 images compare variants; "
            "the accuracies are far from what the models can reach.",
            "\n".join(lines),
        ]
    )


def _create_on_meta(claim: str, variant: str) -> int:
    with torch.device("meta"):
        return count_parameters(next(make for key, make in BUILDERS.items() if key[::2] == (claim, variant))())


def main(argv: Sequence[str] | None = None) -> int:
    table = Table(
        name="small_claims",
        command="python -m bench.small_claims",
        data="CIFAR-10 as JPEG copies of quality 75: the first 10,000 training images, all 10,000 test images",
        title="Small trainings that the specifications ask for",
        notes=summarize,
    )
    return main_of(table, list_jobs, measure, argv, prepare=lambda: data_file(CIFAR))


if __name__ == "__main__":
    sys.exit(main())
