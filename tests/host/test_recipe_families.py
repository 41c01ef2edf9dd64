"""A recipe may name any variant: other families through training, int8, TFLite and Core ML to a bundle."""

from pathlib import Path

import pytest

from device.contract.bundle import read_manifest
from host.recipe import parse_recipe
from host.stages.order import run_recipe

RECIPE = """
name = "family"
data = {{ source = "digits" }}
model = {{ family = "{}", variant = "{}" }}
train = {{ epochs = 4 }}
quantize = {{ max_accuracy_drop = 0.05 }}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nextvit/field-32", "mobileformer/field-32", "ninformer/field-32"])
def test_a_recipe_of_another_family_ends_in_a_bundle(name, tmp_path: Path):
    recipe = parse_recipe(RECIPE.format(*name.split("/")), where="test")
    directory = run_recipe(recipe, tmp_path, until="export", report=lambda *_: None)
    manifest = read_manifest(directory / "export" / "family-0.1.0.fieldvit")
    assert manifest.coreml is not None
    assert manifest.coreml.argmax_agreement >= 0.99
    assert manifest.float_accuracy >= 0.85
