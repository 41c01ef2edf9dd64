"""Train NiNformer, its rivals and its ablations alike; write the table `ninformer_cifar10`.

    python -m bench.ninformer_cifar10 [--workers N] [--only PART_OF_A_LABEL]

Reads `cifar10_jpeg75.npz` and `mnist.npz.xz` from the folder FIELDVIT_DATA, else from `../shared/data` beside the
repository. Resumable: finished rows stay (`bench.jobs`), and a training that was stopped goes on after its last whole
epoch, to the same weights (`bench/results/unfinished`, not in the repository).

Recipe, the same for every model: the authors' (Adam 1e-3 constant, batch 128, cross-entropy, dropout 0.5 in every FF;
on CIFAR-10 random crop with padding 4 and flip) on the first 10,000 training images, 10 epochs on CIFAR-10 and 4 on
MNIST, instead of 100 epochs on all. MNIST is not augmented. Normalized with mean 0.5 and deviation 0.5. The last epoch
counts. Batches, crops and flips depend on the seed alone.

Cost of one training step of 128 images, in seconds of CPU time of one core of an AMD EPYC (Zen 4, AVX-512 with bfloat16):

| | float32 | bfloat16 autocast |
|---|---|---|
| NiNformer | 3.02 | 1.69 |
| MLP-Mixer, 8 blocks | 3.95 | 2.31 |
| ViT | 1.93 | 1.45 |
| MLP-Mixer, 4 blocks | 2.07 | 1.19 |

So training uses bfloat16 autocast (weights, Adam and norms stay float32) where the processor computes in bfloat16, else
float32, as the column `precision` says; tests use float32. About 13 hours of CPU time in all. Two things save time and change nothing in distribution: gradients are summed over slices of 16 images,
which stay in the cache, and dropout draws one random byte per element (`ByteDropout`; PyTorch's generator took 39 % of
a step).
"""

import io
import lzma
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from bench.jobs import Job, Table, digest, main_of
from bench.record import RESULTS, Row
from bench.small_classifiers import CLASSIFIERS
from host.errors import DataError

DATA = Path(os.environ.get("FIELDVIT_DATA") or Path(__file__).parents[2] / "shared" / "data")
CIFAR, MNIST = "CIFAR-10 (JPEG q75)", "MNIST"
FILES = {CIFAR: "cifar10_jpeg75.npz", MNIST: "mnist.npz.xz"}
SHAPES = {CIFAR: (3, 32, 32), MNIST: (1, 28, 28)}
EPOCHS = {CIFAR: 10, MNIST: 4}
NUM_CLASSES = 10
SEEDS = (0, 1, 2)
OURS = "NiNformer"
RIVALS = ("MLP-Mixer, 4 blocks", "MLP-Mixer, 8 blocks", "ViT", "Local-ViT")
DROPOUT = 0.5

RECIPE_VERSION = 1
"""Raise when the training below changes in effect: everything is measured again."""
RECIPE: Mapping[str, Any] = {
    "version": RECIPE_VERSION,
    "images": 10_000,
    "batch_size": 128,
    "optimizer": "Adam, 1e-3, constant",
    "test": "float32",
}
LEARNING_RATE = 1e-3
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
UNFINISHED = RESULTS / "unfinished"
SLICE = 16
"""Images whose activations are in memory at a time."""
CROP_PADDING = 4
CLEAR_DROP = 0.02
"""Of accuracy: what claim 4 calls a clear drop."""


def list_jobs() -> list[Job]:
    """All rows, the most informative first."""
    main = [
        _job(dataset, model, DROPOUT, seed) for dataset in (CIFAR, MNIST) for seed in SEEDS for model in CLASSIFIERS
    ]
    return main + [_job(CIFAR, model, 0.0, SEEDS[0]) for model in (OURS, *RIVALS)]


def _job(dataset: str, model: str, dropout: float, seed: int) -> Job:
    return Job(
        key={"dataset": dataset, "model": model, "dropout": dropout, "seed": seed},
        settings={**RECIPE, "epochs": EPOCHS[dataset], "augmented": dataset == CIFAR},
        defined_by=model_digest(dataset, model),
    )


def build(dataset: str, model: str, *, dropout: float, seed: int) -> nn.Module:
    """A model with the weights that `seed` draws."""
    in_chans, image_size, _ = SHAPES[dataset]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLASSIFIERS[model](image_size=image_size, num_classes=NUM_CLASSES, in_chans=in_chans, dropout=dropout)


@cache
def model_digest(dataset: str, model: str) -> str:
    """Digest of what a model computes: its logits before and after one step of gradient descent, and its dropouts.

    In float64, to 4 digits: rewriting the code leaves it, another function or another initialization does not.
    """
    network = build(dataset, model, dropout=DROPOUT, seed=0).double().eval()
    shape = (2, *SHAPES[dataset])
    images = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape).sin_()
    logits = network(images)
    logits.square().sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.1 * parameter.grad
        logits = torch.cat([logits, network(images)])
    dropouts = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
    return digest([f"{value:.3e}" for value in logits.flatten().tolist()], dropouts)


def measure(job: Job) -> Row:
    """Train and test one model."""
    torch.set_num_threads(1)
    dataset, seed, settings = job.key["dataset"], job.key["seed"], job.settings
    images, labels, test_images, test_labels = load_images(dataset)
    images, labels = images[: settings["images"]], labels[: settings["images"]]
    model = build(dataset, job.key["model"], dropout=job.key["dropout"], seed=seed)
    progress = Progress(UNFINISHED / f"{job.recipe}.pt")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout
        train(model, images, labels, settings, progress, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    features = _features(model, normalize(test_images))
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": settings["epochs"],
        "images": len(images),
        "precision": "bfloat16" if HAS_BFLOAT16 else "float32",
        "clean_accuracy": _accuracy(model, features, test_labels),
        "script_protocol_accuracy": None,
        "train_loss": round(progress.loss, 4) if math.isfinite(progress.loss) else None,
        "permuted_accuracy": None,
        "permuted_output_changes": None,
    }
    if settings["augmented"]:
        distorted = _features(model, normalize(augment(test_images, generator)))
        row["script_protocol_accuracy"] = _accuracy(model, distorted, test_labels)
    if job.key["model"] == OURS:
        permuted = _features(model, normalize(test_images), torch.randperm(model.num_tokens, generator=generator))
        row["permuted_accuracy"] = _accuracy(model, permuted, test_labels)
        row["permuted_output_changes"] = not torch.allclose(permuted, features, rtol=1e-3, atol=1e-4)
    progress.path.unlink(missing_ok=True)
    return row | {"cpu_minutes": round(progress.cpu_seconds / 60, 1)}


@dataclass(slots=True)
class Progress:
    """How far a training is, and the file that keeps it from epoch to epoch.

    Args:
        path: the file; it need not exist yet.
        epochs: whole epochs done.
        loss: mean of the last epoch.
        cpu_seconds: spent on these epochs, in all the processes that worked on them.
    """

    path: Path
    epochs: int = 0
    loss: float = math.nan
    cpu_seconds: float = 0.0

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Write all that the next epoch depends on, whole or not at all."""
        state = {
            "progress": [self.epochs, self.loss, self.cpu_seconds],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generators": [generator.get_state(), torch.get_rng_state()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Go back to the last whole epoch; without a file to the beginning."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        self.epochs, self.loss, self.cpu_seconds = state["progress"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        own, shared = state["generators"]
        generator.set_state(own)
        torch.set_rng_state(shared)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, settings: Mapping[str, Any], progress: Progress, *, seed: int
) -> None:
    """Train in place on images uint8 [N, C, H, W], from `progress` on; leave in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    _replace_dropout(model.train())
    progress.load(model, optimizer, generator)
    while progress.epochs < settings["epochs"]:
        start, total = time.process_time(), 0.0
        for batch in torch.randperm(len(images), generator=generator).split(settings["batch_size"]):
            x = augment(images[batch], generator) if settings["augmented"] else images[batch]
            total += _backward(model, normalize(x), labels[batch])
            optimizer.step()
            optimizer.zero_grad()
        progress.epochs += 1
        progress.loss = total / len(images)
        progress.cpu_seconds += time.process_time() - start
        progress.save(model, optimizer, generator)
    model.eval()


def _backward(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Add the gradient of the batch's mean loss, slice by slice; returns the summed loss."""
    total = 0.0
    for x, y in zip(images.split(SLICE), labels.split(SLICE), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        (loss / len(images)).backward()
        total += loss.item()
    return total


class ByteDropout(nn.Dropout):
    """Dropout that draws one random byte per element: exact for `p` in steps of 1 / 256."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= round(256 * self.p)
        return x * (keep.to(x.dtype) / (1 - self.p))


def _replace_dropout(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, ByteDropout(child.p))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop with 4 black pixels around, then flip: uint8 [B, C, H, W] to the same shape."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, [CROP_PADDING] * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, batch, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # [B, H], [B, W]
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[(*index, rows[:, None, :, None], columns[:, None, None, :])]


def normalize(images: Tensor) -> Tensor:
    """0..255 to -1..1: mean 0.5 and deviation 0.5."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def _features(model: nn.Module, images: Tensor, order: Tensor | None = None) -> Tensor:
    """Features [N, D] in float32; with `order`, of NiNformer with its tokens permuted before the first block."""
    if order is None:
        return torch.cat([model.forward_features(x) for x in images.split(SLICE)])
    return torch.cat([model.blocks(model.embed(x)[:, order]).mean(dim=1) for x in images.split(SLICE)])


@torch.no_grad()
def _accuracy(model: nn.Module, features: Tensor, labels: Tensor) -> float:
    return (model.head(features).argmax(dim=1) == labels).float().mean().item()


@cache
def load_images(dataset: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images uint8 [N, C, H, W] and labels int64 [N] for training, then for the test.

    Raises:
        DataError: the file is missing.
    """
    path = data_file(dataset)
    if dataset == MNIST:
        arrays = np.load(io.BytesIO(lzma.decompress(path.read_bytes())))
        images, test_images = (arrays[name][:, None] for name in ("x_train", "x_test"))
    else:
        arrays = np.load(path)
        images, test_images = (_decode(arrays, part, limit=RECIPE["images"]) for part in ("train", "test"))
    labels, test_labels = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("y_train", "y_test"))
    return torch.from_numpy(images), labels[: len(images)], torch.from_numpy(test_images), test_labels


def data_file(dataset: str) -> Path:
    """Where the images lie.

    Raises:
        DataError: they are not there.
    """
    path = DATA / FILES[dataset]
    if not path.is_file():
        raise DataError(f"{path} is missing; name the folder that holds {path.name} in FIELDVIT_DATA")
    return path


def _decode(arrays: Mapping[str, np.ndarray], part: str, *, limit: int) -> np.ndarray:
    """The first images of the packed JPEGs, uint8 [N, 3, 32, 32]; all files share one header."""
    header, data, offset = arrays["jpeg_header"].tobytes(), arrays[f"{part}_bytes"].tobytes(), arrays[f"{part}_offset"]
    files = (header + data[offset[i] : offset[i + 1]] for i in range(min(limit, len(offset) - 1)))
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]).transpose(0, 3, 1, 2).copy()


def summarize(rows: Sequence[Row]) -> str:
    """The notes of the table: means over the seeds, gaps to NiNformer, and what became of each claim."""
    parts = [
        "Shares in 0..1. `script_protocol_accuracy` crops and flips the test images too, as the authors' script does. "
        "`permuted_accuracy` permutes the tokens of all test images alike before the first block. `cpu_minutes` is "
        "time of one core. 10,000 training images and 10 or 4 epochs, not the paper's 100 epochs on all: the order of "
        "the models is compared, not the paper's accuracy. The rivals' sizes are ours; the authors' are not published.",
        *(part for dataset in (CIFAR, MNIST) for part in (_means_table(rows, dataset), _claims_list(rows, dataset))),
        _fairness(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _by_seed(
    rows: Sequence[Row], dataset: str, model: str, column: str = "clean_accuracy", dropout: float = DROPOUT
) -> dict[int, Any]:
    wanted = {"dataset": dataset, "model": model, "dropout": dropout}
    return {row["seed"]: row[column] for row in rows if wanted.items() <= row.items()}


def _gaps(rows: Sequence[Row], dataset: str, model: str) -> list[float]:
    """NiNformer's accuracy less the other model's, per seed that both have."""
    ours, theirs = _by_seed(rows, dataset, OURS), _by_seed(rows, dataset, model)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds; of a single seed no deviation."""
    if not values:
        return "–"
    return f"{mean(values):{sign}.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _means_table(rows: Sequence[Row], dataset: str) -> str:
    lines = [
        f"| {dataset}, dropout {DROPOUT} | seeds | clean accuracy | script's protocol | gap to NiNformer |",
        "|---|---|---|---|---|",
    ]
    for model in CLASSIFIERS:
        clean = list(_by_seed(rows, dataset, model).values())
        script = [value for value in _by_seed(rows, dataset, model, "script_protocol_accuracy").values() if value]
        gap = "–" if model == OURS else _spread([-gap for gap in _gaps(rows, dataset, model)], "+")
        lines.append(f"| {model} | {len(clean)} | {_spread(clean)} | {_spread(script)} | {gap} |")
    return "\n".join(lines)


def _claims_list(rows: Sequence[Row], dataset: str) -> str:
    head = (
        f"Claims on {dataset}, dropout {DROPOUT}, gaps in accuracy paired by seed; none is judged on fewer than "
        f"{len(SEEDS)} seeds:"
    )
    return "\n".join([head, "", *(f"- {line}" for line in _claims(rows, dataset))])


def _claims(rows: Sequence[Row], dataset: str) -> Iterator[str]:
    for rival in RIVALS:
        yield f"2, better than {rival}: {_verdict(_gaps(rows, dataset, rival))}"
    for ablation in ("NiNformer, sum instead of product", "NiNformer, learned table as gate"):
        yield f"3, better than {ablation}: {_verdict(_gaps(rows, dataset, ablation))}"
    gaps = _gaps(rows, dataset, "NiNformer, no token FF")
    yield f"4, clearly (by {CLEAR_DROP} with every seed) better than without token FF: {_verdict(gaps, CLEAR_DROP)}"
    changes = list(_by_seed(rows, dataset, OURS, "permuted_output_changes").values())
    permuted = _spread(list(_by_seed(rows, dataset, OURS, "permuted_accuracy").values()))
    verdict = "incomplete" if len(changes) < len(SEEDS) else "reproduced" if all(changes) else "not reproduced"
    yield f"5, permuted tokens change the output: {verdict}; accuracy then {permuted}, {len(changes)} seeds"


def _verdict(gaps: Sequence[float], least: float = 0.0) -> str:
    measured = f"gap {_spread(gaps, '+')}, {len(gaps)} seeds"
    if len(gaps) < len(SEEDS):
        return f"incomplete; {measured}"
    if min(gaps) > least:
        return f"reproduced with every seed; {measured}"
    return f"not reproduced, {'the reverse with every seed' if max(gaps) < 0 else 'seeds disagree'}; {measured}"


def _fairness(rows: Sequence[Row]) -> str:
    """One seed without dropout, which 10 epochs may not pay for alike in every model."""
    found = {model: _by_seed(rows, CIFAR, model, dropout=0.0) for model in (OURS, *RIVALS)}
    figures = [f"{model} {value:.4f}" for model, seeds in found.items() for value in seeds.values()]
    if not figures:
        return ""
    return f"Without dropout, one seed and therefore no claim, clean accuracy on {CIFAR}: {', '.join(figures)}."


def main(argv: Sequence[str] | None = None) -> int:
    table = Table(
        name="ninformer_cifar10",
        command="python -m bench.ninformer_cifar10",
        data="CIFAR-10 as JPEG copies of quality 75, and MNIST: the first 10,000 training images (balanced in CIFAR-10), "
        "all 10,000 test images",
        title="NiNformer, its rivals and its ablations, trained alike",
        notes=summarize,
    )
    return main_of(table, list_jobs, measure, argv, prepare=lambda: [data_file(dataset) for dataset in FILES])


if __name__ == "__main__":
    sys.exit(main())
