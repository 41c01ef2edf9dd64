"""The order of stages: what is refused before training, what a failure leaves, and starting from a file of weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from device.contract.files import write_atomic
from host.errors import ExportError, ModelError, RecipeError
from host.models.checkpoint import load_model, save_model
from host.models.registry import create_model
from host.pipeline import stage_metrics
from host.recipe import Recipe, load_recipe, parse_recipe
from host.stages.order import run_recipe

RECIPE = """
name = "mine"
data = {{ source = "digits", held_back = ["8", "9"] }}
train = {{ epochs = 1 }}
[model]
family = "{family}"
variant = "{variant}"
{more}
"""
START = 'pretrained = true\nweights = "start.safetensors"'


def make_recipe(family: str, variant: str, more: str = "") -> Recipe:
    return parse_recipe(RECIPE.format(family=family, variant=variant, more=more), where="test")


def write_recipe(folder: Path) -> Recipe:
    """A recipe that starts from a file of weights beside it."""
    save_model(create_model("cnn", "small", num_classes=10, in_chans=1), folder / "start.safetensors")
    (folder / "mine.toml").write_text(RECIPE.format(family="cnn", variant="small", more=START))
    return load_recipe(folder / "mine.toml")


def train(recipe: Recipe, folder: Path) -> list[str]:
    """What was reported."""
    lines: list[str] = []
    run_recipe(recipe, folder / "runs", until="train", report=lambda *report: lines.append(report[-1]))
    return lines


def test_a_finished_training_does_not_need_its_weights_any_more(tmp_path):
    recipe = write_recipe(tmp_path)
    lines = train(recipe, tmp_path)
    assert "weights of start.safetensors: " in lines[0]
    assert "head new (10 -> 8 classes)" in lines[0]
    assert stage_metrics(tmp_path / "runs" / "mine", "train")["pretrained"]["source"] == "start.safetensors"
    (tmp_path / "start.safetensors").unlink()
    assert train(recipe, tmp_path) == ["finished before, not repeated; its pretrained weights are gone, and not needed"]
    with pytest.raises(RecipeError, match=r"model\.weights: .*start\.safetensors is not a file"):
        train(replace(recipe, seed=1), tmp_path)
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["train"]


def test_other_words_for_the_licence_train_nothing_again_and_other_weights_do(tmp_path):
    recipe = write_recipe(tmp_path)
    train(recipe, tmp_path)
    assert len(train(replace(recipe, model=replace(recipe.model, licence="MIT")), tmp_path)) == 1
    save_model(create_model("cnn", "small", num_classes=8, in_chans=1, seed=5), tmp_path / "start.safetensors")
    assert len(train(recipe, tmp_path)) > 1


def test_missing_weights_are_refused_before_anything_is_made(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "start.safetensors").unlink()
    with pytest.raises(RecipeError, match="name a safetensors file"):
        train(recipe, tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["junk", "checkpoint-3.pt"])
def test_a_refused_training_leaves_only_a_checkpoint(tmp_path, monkeypatch, name):
    def fail(recipe, out, report):
        write_atomic(out / name, b"half")
        raise ModelError("refused")

    monkeypatch.setattr("host.stages.train.train", fail)
    with pytest.raises(ModelError, match="refused"):
        train(make_recipe("cnn", "small"), tmp_path)
    left = sorted(path.name for path in (tmp_path / "runs" / "mine").rglob("*"))
    assert left == (["checkpoint-3.pt", "train.partial", "wanted"] if "checkpoint" in name else [])


def test_a_model_over_a_board_s_budget_is_refused_before_it_is_trained(tmp_path):
    recipe = make_recipe("deit", "base")
    with pytest.raises(
        ExportError, match=r"generic-x86-64: the int8 .* of deit/base would have about .* choose deit/small"
    ):
        run_recipe(recipe, tmp_path, until="export", report=lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_wrong_options_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(RecipeError, match="cnn/small has no option 'depth'; options of cnn/small are width"):
        train(make_recipe("cnn", "small", "options = { depth = 3 }"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_reach_the_trained_model(tmp_path):
    train(make_recipe("cnn", "small", "options = { width = 8 }"), tmp_path)
    model = load_model(tmp_path / "runs/mine/train/model.safetensors", "cnn", "small", num_classes=8, in_chans=1)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 8)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20_000
