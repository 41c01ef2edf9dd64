"""Checkpoints that ship: small, in float16, each with a card, loaded by name, and taken to a board with one command."""

import json
from pathlib import Path

import pytest
import torch

import host.zoo
from device.contract.board import board_names
from device.contract.bundle import read_manifest
from host.cli import main
from host.data.spec import DataSpec
from host.errors import ModelError, RecipeError
from host.models.pretrained import load_pretrained
from host.models.registry import create_model, find_model
from host.pipeline import stage_metrics
from host.recipe import ModelSpec, load_recipe, parse_recipe
from host.zoo import FOLDER, find_checkpoint
from host.zoo.cards import Card, list_cards, read_card
from host.zoo.save import save_checkpoint

CARD = Card(
    name="cnn-small-test",
    family="cnn",
    variant="small",
    labels=tuple("01234567"),
    data=DataSpec(source="digits", held_back=("8", "9")),
    seed=0,
    description="drawn",
    terms="none",
    recipe="0",
    epochs=1,
    test_accuracy=0.5,
    test_images=2,
)


def make_model() -> torch.nn.Module:
    return create_model("cnn", "small", num_classes=len(CARD.labels), in_chans=1, seed=1)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    folder = tmp_path / "zoo"
    folder.mkdir()
    monkeypatch.setattr(host.zoo, "FOLDER", folder)
    save_checkpoint(make_model(), CARD, folder)
    return folder


def test_a_recipe_starts_from_a_checkpoint_by_its_name(zoo, tmp_path):
    spec = ModelSpec(family="cnn", variant="small", pretrained=True, weights="zoo:cnn-small-test")
    path = find_checkpoint("cnn-small-test")
    assert spec.found_from(tmp_path / "elsewhere").weights == str(path)
    model = create_model("cnn", "small", num_classes=len(CARD.labels), in_chans=1)
    loaded = load_pretrained(model, find_model("cnn", "small"), path)
    assert "float16 cast to float32" in str(loaded)
    torch.testing.assert_close(model.head.weight, make_model().head.weight, rtol=1e-3, atol=1e-6)


def test_cards_come_back_as_they_were_written(zoo):
    assert list_cards() == [CARD]
    before = find_checkpoint(CARD.name).read_bytes()
    save_checkpoint(make_model(), CARD, zoo)
    assert find_checkpoint(CARD.name).read_bytes() == before


def test_an_unknown_checkpoint_is_named_with_what_there_is(zoo):
    with pytest.raises(ModelError, match=r"no 'cnn-small-tset'; it has cnn-small-test; did you mean cnn-small-test\?"):
        ModelSpec(family="cnn", variant="small", pretrained=True, weights="zoo:cnn-small-tset").found_from(zoo)
    with pytest.raises(ModelError, match=r"no 'nothing'; it has cnn-small-test"):
        load_recipe(Path("zoo:nothing"))


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00{}", b"not a checkpoint at all"]
)
def test_a_damaged_checkpoint_is_named(zoo, content):
    find_checkpoint(CARD.name).write_bytes(content)
    with pytest.raises(ModelError, match=r"cnn-small-test\.safetensors: has no card .* install the package again"):
        read_card(CARD.name)


def test_the_zoo_is_listed(zoo, capsys):
    assert main(["models", "zoo"]) == 0
    assert "cnn-small-test" in capsys.readouterr().out
    assert main(["models", "zoo", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (card["terms"], card["data"]["held_back"]) == ("none", ["8", "9"])


def test_weights_without_training_are_those_of_the_checkpoint(zoo, tmp_path):
    assert main(["train", "zoo:cnn-small-test", "--runs", str(tmp_path / "runs")]) == 0
    directory = tmp_path / "runs" / "cnn-small-test"
    assert stage_metrics(directory, "train")["final_loss"] is None
    trained = load_pretrained(make_model(), find_model("cnn", "small"), directory / "train" / "model.safetensors")
    assert trained.num_loaded == trained.num_tensors
    model = create_model("cnn", "small", num_classes=len(CARD.labels), in_chans=1)
    load_pretrained(model, find_model("cnn", "small"), directory / "train" / "model.safetensors")
    for name, tensor in make_model().state_dict().items():
        half = tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor
        torch.testing.assert_close(model.state_dict()[name], half, rtol=0, atol=0)


@pytest.mark.slow
def test_one_command_takes_a_checkpoint_to_a_board(zoo, tmp_path, capsys):
    places = [f"--{name}={tmp_path / name}" for name in ("runs", "repo", "keys")]
    target = f"dir:{tmp_path / 'board'}"
    assert main(["run", "zoo:cnn-small-test", "--flash", target, "--board", "raspberry-pi-5", *places]) == 0
    bundle = tmp_path / "runs" / "cnn-small-test" / "export" / "cnn-small-test-0.1.0.fieldvit"
    manifest = read_manifest(bundle)
    assert {artifact.precision for artifact in manifest.artifacts} == {"float32", "int8"}
    assert manifest.licence == "none"
    assert set(manifest.boards) == set(board_names())
    assert (tmp_path / "board").is_dir()
    assert "is ready for raspberry-pi-5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", r"train\.epochs = 0 leaves the weights as they are; start from some: model\.pretrained = true"),
        (
            "pretrained = true\n[distill]\nmethod = 'soft'\nteacher = 'timm:deit_tiny'",
            "leave the table distill out",
        ),
        (
            "pretrained = true\n[distill]\nmethod = 'soft'\nteacher = 'train'\n[teacher]\ntrain = { epochs = 0 }\n"
            "model = { family = 'cnn', variant = 'small' }",
            r"start from some: teacher\.model\.pretrained = true",
        ),
    ],
)
def test_no_epochs_need_weights(more, message):
    text = f"name = 'x'\ndata = {{ source = 'digits' }}\ntrain = {{ epochs = 0 }}\n[model]\nfamily = 'cnn'\nvariant = 'small'\n{more}"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, where="test")


def test_what_ships_is_small_and_fits_its_models():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 25e6
    for card in list_cards():
        entry = find_model(card.family, card.variant)
        model = entry.build(num_classes=len(card.labels), in_chans=3)
        loaded = load_pretrained(model, entry, find_checkpoint(card.name))
        assert loaded.num_loaded == loaded.num_tensors
        assert load_recipe(Path(f"zoo:{card.name}")).train.epochs == 0
