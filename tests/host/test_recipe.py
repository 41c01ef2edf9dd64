"""Recipes: the shipped one loads, and every mistake is named."""

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
        ("distill = { teacher = 'owl' }", "teacher 'cnn'"),
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
