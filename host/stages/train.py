"""The train stage: the teacher, if the recipe distils, then the model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from device.preprocess import preprocess
from host.distill.soft import SoftDistillation
from host.models.checkpoint import save_model
from host.models.pretrained import load_pretrained
from host.models.registry import create_model, find_model
from host.pipeline import Report
from host.recipe import Recipe
from host.stages.data import input_spec, load_split
from host.training.config import TEACHER_CONFIG, TrainConfig
from host.training.loop import EpochMetrics
from host.training.loop import train as fit

WEIGHTS, TEACHER_WEIGHTS, METRICS = "model.safetensors", "teacher.safetensors", "metrics.jsonl"


def train(recipe: Recipe, out: Path, report: Report) -> Mapping[str, Any]:
    """Train the recipe's model into `out`; the base classes' training images only.

    Raises:
        TrainingError: a loss that is not finite, or fewer images than a batch.
        ModelError: no such model.
    """
    split, spec = load_split(recipe), input_spec(recipe)
    images = preprocess(split.train.images, spec)
    shape = {"num_classes": len(split.base_names), "in_chans": spec.channels, "seed": recipe.seed}
    model = create_model(recipe.model.family, recipe.model.variant, **shape)
    if recipe.model.pretrained:
        _load_pretrained(model, recipe, report)
    methods: dict[str, Any] = {}
    if recipe.distill:
        teacher = create_model(recipe.distill.teacher, "small", **shape)
        config = replace(TEACHER_CONFIG, epochs=min(TEACHER_CONFIG.epochs, recipe.train.epochs))
        fit(
            teacher,
            images,
            split.train.labels,
            config,
            seed=recipe.seed,
            on_epoch=_reporter(report, "teacher", config, out),
        )
        save_model(teacher, out / TEACHER_WEIGHTS)
        methods = {"teacher": teacher, "distill": _distillation(recipe)}
    on_epoch = _reporter(report, "student", recipe.train, out)
    metrics = fit(model, images, split.train.labels, recipe.train, seed=recipe.seed, on_epoch=on_epoch, **methods)
    save_model(model, out / WEIGHTS)
    return {"final_loss": metrics[-1].loss, "parameters": _parameters(model)}


def _load_pretrained(model: nn.Module, recipe: Recipe, report: Report) -> None:
    path = Path(recipe.model.weights) if recipe.model.weights else None
    report("train", 0, recipe.train.epochs, f"weights from {path or 'the hub'}")
    load_pretrained(model, find_model(recipe.model.family, recipe.model.variant), path)


def _distillation(recipe: Recipe) -> SoftDistillation:
    assert recipe.distill is not None
    return SoftDistillation(
        temperature=recipe.distill.temperature,
        weight=recipe.distill.weight,
        label_smoothing=recipe.train.label_smoothing,
    )


def _reporter(report: Report, who: str, config: TrainConfig, out: Path) -> Callable[[EpochMetrics], None]:
    """Show each epoch and append it to `metrics.jsonl`."""

    def on_epoch(metrics: EpochMetrics) -> None:
        report("train", metrics.epoch, config.epochs, f"{who}, loss {metrics.loss:.3f}")
        with (out / METRICS).open("a") as file:
            file.write(json.dumps({"model": who, **asdict(metrics)}) + "\n")

    return on_epoch


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
