"""The stages of a recipe in their order. What can be refused is refused before the first, the cheapest check first."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from device.contract.board import load_board
from device.contract.bundle import read_manifest
from device.contract.errors import ArtifactError, DeviceError
from device.contract.records import to_table
from host.errors import HostError, RecipeError
from host.files import sha256_of
from host.pipeline import Report, Stage, is_finished, run_stage, stage_metrics
from host.recipe import Recipe

ORDER = ("train", "quantize", "export")


def run_recipe(recipe: Recipe, runs: Path, *, until: str, report: Report) -> Path:
    """Run the stages up to and including `until`, cached ones from disk; returns `runs/NAME`.

    Of several processes that `torchrun` started, all train; the first one writes, and does the other stages.
    """
    directory = runs / recipe.name
    weights = _weights_digest(recipe, directory)
    _require_model(recipe, until)
    _require_classes(recipe)
    for bundle in recipe.export.migrate_from if until == "export" else ():
        _require_bundle(_earlier(bundle))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not _take_part(recipe, weights, directory, report):
        return directory
    upstream = ""
    for name in ORDER[: ORDER.index(until) + 1]:
        worked: list[str] = []
        stage = _stage(name, recipe, weights, directory, report, worked)
        try:
            upstream = run_stage(stage, directory, upstream=upstream)
        except (HostError, DeviceError, ConversionError):
            _remove_unfinished(directory / f"{name}.partial")
            raise
        if not worked:
            note = "; its pretrained weights are gone, and not needed" if name == "train" and _is_gone(recipe) else ""
            report(name, 1, 1, f"finished before, not repeated{note}")
    return directory


def _take_part(recipe: Recipe, weights: str, directory: Path, report: Report) -> bool:
    """Train along, unless this is the first process, which is returned True and goes on by itself."""
    from host.stages.train import train
    from host.training.engine import make_engine

    engine = make_engine()
    stage = _stage("train", recipe, weights, directory, report, [])
    is_finished_there = engine.broadcast(is_finished(stage, directory))
    if engine.is_global_zero:
        return True
    if not is_finished_there:
        with tempfile.TemporaryDirectory(prefix="fieldvit-") as scratch:
            train(recipe, Path(scratch), lambda *progress: None)
    return False


def _remove_unfinished(partial: Path) -> None:
    """Clear away what a refused stage left, unless training can go on from a checkpoint in it."""
    if not any(partial.glob("checkpoint*")):
        shutil.rmtree(partial, ignore_errors=True)


def _require_model(recipe: Recipe, until: str) -> None:
    """Find out before training that there is no such model, or that its artifacts would be over a board's budget."""
    from host.models.options import count_for
    from host.models.registry import list_models
    from host.stages.budget import require_room
    from host.stages.data import input_spec, load_split, model_entry

    entry = model_entry(recipe.model)
    if until == "export":
        shape = {"num_classes": len(load_split(recipe).base_names), "in_chans": input_spec(recipe).channels}
        require_room(
            entry.name,
            count_for(entry, **shape),
            [load_board(name) for name in recipe.export.boards],
            [other for other in list_models() if other.family == entry.family],
            has_coreml="coreml" in recipe.export.formats,
        )


def _require_classes(recipe: Recipe) -> None:
    """Find out before training that the head could not hold the classes."""
    from host.stages.data import load_split

    classes = len(load_split(recipe).label_names)
    if recipe.continual.max_classes < classes:
        raise RecipeError(
            f"continual.max_classes is {recipe.continual.max_classes}, the data has {classes} classes; raise it to that or more"
        )


def _stage(name: str, recipe: Recipe, weights: str, directory: Path, report: Report, worked: list[str]) -> Stage:
    from host.stages.data import data_digest, load_split

    table = recipe.table()
    model = {key: value for key, value in table["model"].items() if key not in ("weights", "licence")}
    common = {key: table[key] for key in ("seed", "data", "task")} | {"model": model}
    common["images"] = data_digest(load_split(recipe))
    if name == "train":
        settings = {name: value for name, value in table["train"].items() if name != "workers"}
        inputs = {**common, "train": settings, "weights": weights, **_teacher_inputs(recipe, table)}
    elif name == "quantize":
        inputs = {**common, "quantize": table["quantize"], "continual": table["continual"]}
    else:
        inputs = {
            **table,
            "images": common["images"],
            "board_profiles": [to_table(load_board(board)) for board in recipe.export.boards],
            "earlier_bundles": [sha256_of(_earlier(bundle)) for bundle in recipe.export.migrate_from],
        }

    def work(out: Path) -> dict[str, object]:
        worked.append(name)
        return _work(name, recipe, directory, out, report)

    return Stage(name=name, inputs=inputs, work=work)


def _teacher_inputs(recipe: Recipe, table: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {"distill": table["distill"], "teacher": table["teacher"]}
    if recipe.distill and recipe.distill.is_path:
        path = Path(recipe.distill.teacher)
        if not path.is_file():
            raise RecipeError(f'distill.teacher: {path} is not a file; name a model.safetensors, or "train"')
        inputs["teacher_weights"] = sha256_of(path)
    return inputs


def _earlier(bundle: str) -> Path:
    path = Path(bundle)
    if not path.is_file():
        raise RecipeError(f"export.migrate_from: {path} is not a file; name a bundle that boards have learned on")
    return path


def _require_bundle(path: Path) -> None:
    """Tell before the training that what the export needs afterwards is something else."""
    try:
        read_manifest(path)
    except ArtifactError as error:
        raise RecipeError(f"export.migrate_from: {error}") from error


def _weights_digest(recipe: Recipe, directory: Path) -> str:
    """SHA-256 of the file of pretrained weights, so that another file of the same name is trained from again.

    A file that is gone counts as the one that the finished training in `directory` started from.
    """
    if not recipe.model.weights:
        return ""
    if not _is_gone(recipe):
        return sha256_of(Path(recipe.model.weights))
    recorded = stage_metrics(directory, "train").get("pretrained")
    if not recorded:
        raise _missing(recipe)
    digest: str = recorded["sha256"]
    return digest


def _is_gone(recipe: Recipe) -> bool:
    """Whether the recipe names a file of weights that is not there."""
    return bool(recipe.model.weights) and not Path(recipe.model.weights).is_file()


def _missing(recipe: Recipe) -> RecipeError:
    return RecipeError(f"model.weights: {recipe.model.weights} is not a file; name a safetensors file")


def _work(name: str, recipe: Recipe, directory: Path, out: Path, report: Report) -> dict[str, object]:
    if name == "train":
        from host.stages.train import train

        if _is_gone(recipe):
            raise _missing(recipe)
        return dict(train(recipe, out, report))
    if name == "quantize":
        from host.stages.quantize import quantize

        return dict(quantize(recipe, directory, out, report))
    from host.stages.export import export

    return dict(export(recipe, directory, out, report))
