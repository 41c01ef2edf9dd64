"""The stages of a recipe in their order."""

from pathlib import Path

from device.contract.board import load_board
from device.contract.records import to_table
from host.errors import RecipeError
from host.files import sha256_of
from host.pipeline import Report, Stage, run_stage
from host.recipe import Recipe
from host.stages.data import load_split

ORDER = ("train", "quantize", "export")


def run_recipe(recipe: Recipe, runs: Path, *, until: str, report: Report) -> Path:
    """Run the stages up to and including `until`, cached ones from disk; returns `runs/NAME`."""
    _require_room(recipe)
    directory = runs / recipe.name
    upstream = ""
    for name in ORDER[: ORDER.index(until) + 1]:
        worked: list[str] = []
        upstream = run_stage(_stage(name, recipe, directory, report, worked), directory, upstream=upstream)
        if not worked:
            report(name, 1, 1, "finished before, not repeated")
    return directory


def _require_room(recipe: Recipe) -> None:
    """Find out before training, not after, that the head could not hold the classes."""
    classes = len(load_split(recipe).label_names)
    if recipe.continual.max_classes < classes:
        raise RecipeError(
            f"continual.max_classes is {recipe.continual.max_classes}, the data has {classes} classes; raise it to that or more"
        )


def _stage(name: str, recipe: Recipe, directory: Path, report: Report, worked: list[str]) -> Stage:
    table = to_table(recipe)
    common = {key: table[key] for key in ("seed", "data", "model", "task")}
    if name == "train":
        inputs = {**common, "train": table["train"], "distill": table["distill"], "weights": _digest(recipe)}
    elif name == "quantize":
        inputs = {**common, "quantize": table["quantize"], "continual": table["continual"]}
    else:
        inputs = {**table, "board_profiles": [to_table(load_board(board)) for board in recipe.export.boards]}

    def work(out: Path) -> dict[str, object]:
        worked.append(name)
        return _work(name, recipe, directory, out, report)

    return Stage(name=name, inputs=inputs, work=work)


def _digest(recipe: Recipe) -> str:
    """What the file of pretrained weights holds: another file of the same name is trained from again."""
    if not recipe.model.weights:
        return ""
    path = Path(recipe.model.weights)
    if not path.is_file():
        raise RecipeError(f"model.weights: {path.absolute()} is not a file; name a safetensors file")
    return sha256_of(path)


def _work(name: str, recipe: Recipe, directory: Path, out: Path, report: Report) -> dict[str, object]:
    if name == "train":
        from host.stages.train import train

        return dict(train(recipe, out, report))
    if name == "quantize":
        from host.stages.quantize import quantize

        return dict(quantize(recipe, directory, out, report))
    from host.stages.export import export

    return dict(export(recipe, directory, out, report))
