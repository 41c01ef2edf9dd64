"""The train stage: the teacher, if the recipe trains one, then the model; on one process or all that `torchrun` started."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from device.contract.manifest import InputSpec
from host.data.splits import ImageSplits
from host.distill.spec import FROM_RECIPE, TIMM
from host.errors import RecipeError
from host.models.checkpoint import Origin, load_origin, save_model
from host.models.checkpoint import load_model as load_weights
from host.models.measure import count_parameters
from host.models.options import build_model
from host.models.pretrained import LoadedWeights, load_pretrained
from host.models.registry import list_models
from host.pipeline import Report
from host.recipe import ModelSpec, Recipe
from host.stages.data import input_spec, load_split, model_entry
from host.stages.features import over_images, torch_logits
from host.stages.objective import make_objective
from host.training.config import TrainConfig
from host.training.engine import make_engine
from host.training.journal import Journal
from host.training.loop import EpochMetrics, Hooks
from host.training.loop import train as fit
from host.training.objective import Objective

WEIGHTS, TEACHER_WEIGHTS = "model.safetensors", "teacher.safetensors"
STUDENT, TEACHER = "model", "teacher"


def train(recipe: Recipe, out: Path, report: Report) -> Mapping[str, Any]:
    """Train the recipe's model into `out`; the base classes' training images only.

    Raises:
        TrainingError: a loss that is not finite, or fewer images than a batch.
        ModelError: no such model, or a teacher of other classes.
    """
    work = _Work(recipe, out, report)
    model, loaded = work.build(recipe.model)
    teacher = work.teacher() if recipe.distill else None
    objective = make_objective(
        model, recipe.train, work.split.train.labels, seed=recipe.seed, distill=recipe.distill, teacher=teacher
    )
    metrics = work.fit(objective, recipe.train, STUDENT)
    work.save(model, recipe.model, WEIGHTS)
    work.clear()
    return {
        "final_loss": metrics[-1].loss if metrics else None,
        "validation": metrics[-1].validation if metrics else {},
        "parameters": count_parameters(model),
        "pretrained": loaded and {"source": loaded.source, "sha256": loaded.sha256},
    }


class _Work:
    """What teacher and student have in common: data, input, seed, and where everything goes."""

    def __init__(self, recipe: Recipe, out: Path, report: Report) -> None:
        self.recipe, self.out, self.report = recipe, out, report
        self.split: ImageSplits = load_split(recipe)
        self.spec: InputSpec = input_spec(recipe)
        self.journal = Journal(out)

    def build(self, model: ModelSpec) -> tuple[nn.Module, LoadedWeights | None]:
        """A model for the data, with its initial or its published weights."""
        entry = model_entry(model)
        built = build_model(entry, num_classes=self.split.num_base, in_chans=self.spec.channels, seed=self.recipe.seed)
        if not model.pretrained:
            return built, None
        loaded = load_pretrained(built, entry, Path(model.weights) if model.weights else None)
        self.report("train", 0, 1, str(loaded))
        return built, loaded

    def teacher(self) -> nn.Module:
        """The teacher, from wherever the recipe has it."""
        distill, described = self.recipe.distill, self.recipe.teacher
        assert distill is not None
        if distill.teacher == FROM_RECIPE:
            assert described is not None
            return self._trained_teacher(described.model, described.train)
        if distill.teacher.startswith(TIMM):
            return self._published_teacher(distill.teacher.removeprefix(TIMM))
        path = Path(distill.teacher)
        origin = load_origin(path)
        return load_weights(
            path, origin.family, origin.variant, num_classes=self.split.num_base, in_chans=self.spec.channels
        )

    def _trained_teacher(self, model: ModelSpec, config: TrainConfig) -> nn.Module:
        """Trained now, or, in a run that goes on, read back."""
        path = self.out / TEACHER_WEIGHTS
        if path.exists():
            shape = {"num_classes": self.split.num_base, "in_chans": self.spec.channels}
            return load_weights(path, model.family, model.variant, options=model.options, **shape)
        teacher, _ = self.build(model)
        self.fit(make_objective(teacher, config, self.split.train.labels, seed=self.recipe.seed), config, TEACHER)
        self.save(teacher, model, TEACHER_WEIGHTS)
        return teacher

    def _published_teacher(self, name: str) -> nn.Module:
        """timm's, as it is: only for the very classes it was trained on."""
        entry = next((entry for entry in list_models() if entry.timm_name == name), None)
        known = ", ".join(entry.timm_name for entry in list_models() if entry.timm_name)
        if entry is None:
            raise RecipeError(f'distill.teacher "{TIMM}{name}": no such model here; there are {known}')
        if entry.num_classes != self.split.num_base:
            raise RecipeError(
                f'distill.teacher "{TIMM}{name}" tells {entry.num_classes} classes apart, the data has {self.split.num_base}; '
                f'train it on the data first: distill.teacher = "{FROM_RECIPE}" and teacher.model = {{ family = '
                f'"{entry.family}", variant = "{entry.variant}", pretrained = true }}'
            )
        return self.build(ModelSpec(family=entry.family, variant=entry.variant, pretrained=True))[0]

    def fit(self, objective: Objective, config: TrainConfig, who: str) -> list[EpochMetrics]:
        """Train, told to the journal and the terminal; without epochs leave the model as it is, and return nothing."""
        if config.epochs == 0:
            objective.model.eval()
            return []
        engine = make_engine(config.precision)
        return fit(
            objective,
            self.split.train,
            self.spec,
            config,
            seed=self.recipe.seed,
            engine=engine,
            checkpoint=self.out / f"checkpoint-{who}.safetensors",
            hooks=self._hooks(config, who, engine),
        )

    def _hooks(self, config: TrainConfig, who: str, engine: Fabric) -> Hooks:
        latest = ""

        def on_step(done: int, total: int, loss: float) -> None:
            self.report(
                "train", done, total, f"{who}, epoch {1 + (done - 1) * config.epochs // total}, loss {loss:.3f}{latest}"
            )

        def on_epoch(metrics: EpochMetrics) -> None:
            nonlocal latest
            latest = "".join(f", validation {name} {value:.2%}" for name, value in metrics.validation.items())
            self.journal.write(who, metrics)

        def validate(model: nn.Module, epoch: int) -> dict[str, float]:
            held_out = self.split.validation
            logits = over_images(torch_logits(model), held_out.images, self.spec)
            return {"accuracy": float((logits.argmax(axis=1) == held_out.labels).mean())}

        return Hooks(on_step=on_step, on_epoch=on_epoch, validate=validate)

    def save(self, model: nn.Module, spec: ModelSpec, name: str) -> None:
        save_model(model, self.out / name, Origin(family=spec.family, variant=spec.variant, options=spec.options))

    def clear(self) -> None:
        """Remove what only a run that goes on needs."""
        for path in self.out.glob("checkpoint-*"):
            path.unlink()
