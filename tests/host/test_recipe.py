"""Recipes: the shipped one loads, every mistake is named, and paths start at the recipe's folder."""

from pathlib import Path

import pytest

from host.errors import RecipeError
from host.recipe import builtin_recipe, load_recipe, parse_recipe

GOOD = """
name = "digits"
data = { source = "digits" }
model = { family = "efficientformer", variant = "field-32" }
train = { epochs = 3 }
"""


def test_builtin_recipe_is_the_quickstart():
    recipe = builtin_recipe("quickstart")
    assert (recipe.name, recipe.data.source, recipe.data.held_back) == ("quickstart", "digits", ("8", "9"))


def test_digest_depends_on_every_value():
    assert parse_recipe(GOOD, where="a").digest() == parse_recipe(GOOD, where="b").digest()
    assert parse_recipe(GOOD, where="a").digest() != parse_recipe(GOOD + "seed = 1\n", where="a").digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sed = 1", "unknown key 'sed'"),
        ("seed = 'x'", "expected int, got 'x'"),
        ("seed = -1", "seed must be 0 or more"),
        ("export = { boards = [] }", "at least one board"),
        ("task = 'paint'", "task 'paint' is unknown"),
        ("version = '1'", "version must be like 1.2.3"),
        ("export = { boards = ['toaster'] }", "board 'toaster' is unknown"),
        ("quantize = { method = 'magic' }", "quantize.method 'magic' is unknown"),
        ("continual = { shrinkage = 2.0 }", "shrinkage"),
        ("distill = { method = 'osmosis' }", "distill.method must be one of soft, hard, feature, deit-lt"),
        ("distill = { teacher = 'train' }", "go together; give both or none"),
        ("seed = ", "not TOML"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(GOOD + change + "\n", where="digits.toml")


def test_missing_table_is_named():
    with pytest.raises(RecipeError, match="missing key 'model'"):
        parse_recipe(GOOD.replace("model =", "# model ="), where="digits.toml")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.toml: cannot be read"):
        load_recipe(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('weights = "a.safetensors"', r"model\.weights = 'a\.safetensors' is only read with model\.pretrained = true"),
        ('licence = "MIT"', r"model\.licence = 'MIT' is only read with model\.pretrained = true"),
        ("options = 3", r"model\.options: expected a table, got 3"),
        ("option = {}", "unknown key 'option'"),
    ],
)
def test_mistakes_in_the_model_table_are_named(keys, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(GOOD.replace('"field-32" }', f'"field-32", {keys} }}'), where="digits.toml")


def write_pretrained(folder: Path, weights: str) -> Path:
    path = folder / "digits.toml"
    path.write_text(GOOD.replace('"field-32" }', f'"field-32", pretrained = true, weights = "{weights}" }}'))
    return path


@pytest.mark.parametrize("weights", ["mine.safetensors", "~/mine.safetensors", "/mine.safetensors"])
def test_weights_are_looked_for_from_the_recipe_s_folder(tmp_path, monkeypatch, weights):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", "/home/someone")
    places = {"m": str(tmp_path / weights), "~": "/home/someone/mine.safetensors", "/": weights}
    assert load_recipe(write_pretrained(tmp_path, weights)).model.weights == places[weights[0]]
    relative = load_recipe(Path("..") / "digits.toml").model.weights
    assert Path(relative).resolve() == Path(places[weights[0]])


def test_where_the_weights_lay_is_in_neither_table_nor_digest(tmp_path):
    recipes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        recipes.append(load_recipe(write_pretrained(tmp_path / name, "mine.safetensors")))
    assert [recipe.table()["model"]["weights"] for recipe in recipes] == ["mine.safetensors"] * 2
    assert recipes[0].digest() == recipes[1].digest()
