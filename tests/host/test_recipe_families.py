"""A recipe may name any variant, or make its own: through training, int8, TFLite and Core ML to a bundle."""

from dataclasses import replace
from pathlib import Path

import pytest

from device.contract.bundle import read_manifest
from host.bundle_checks import recipe_of
from host.files import sha256_of
from host.models.checkpoint import save_model
from host.models.options import build_model, with_options
from host.models.pretrained import UNKNOWN_LICENCE
from host.models.registry import find_model
from host.recipe import Recipe, parse_recipe
from host.stages.order import run_recipe
from host.training.config import TrainConfig

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


STAGES = [
    {"num_conv": 1, "conv_width": 32},
    {"num_conv": 1, "conv_width": 64, "transformer_width": 128, "sr_ratio": 2},
]
EASY = TrainConfig(epochs=12, batch_size=32, learning_rate=2e-3)
WIDTHS = [{"num_heads": 2, "qk_dim": 24, "v_dim": 32, "mlp_dim": mlp_dim} for mlp_dim in (128, 192, 128)]
OWN = {"nextvit/field-32": {"stages": STAGES, "drop_path": 0.0}, "deit/field-32": {"widths": WIDTHS}}


def own_recipe(name: str, weights: Path) -> Recipe:
    """A recipe of the model with options that starts from `weights`, which are written; Core ML is tested above."""
    recipe = parse_recipe(RECIPE.format(*name.split("/")), where="test")
    model = replace(recipe.model, options=OWN[name], pretrained=True, weights=str(weights))
    entry = with_options(find_model(model.family, model.variant), OWN[name])
    save_model(build_model(entry, num_classes=10, in_chans=3), weights)
    return replace(recipe, model=model, train=EASY, export=replace(recipe.export, formats=("tflite",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_model_of_one_s_own_ends_in_a_bundle_that_says_where_its_weights_are_from(name, tmp_path: Path):
    recipe = own_recipe(name, tmp_path / "start.safetensors")
    directory = run_recipe(recipe, tmp_path, until="export", report=lambda *_: None)
    manifest = read_manifest(directory / "export" / "family-0.1.0.fieldvit")
    assert manifest.licence == UNKNOWN_LICENCE
    assert manifest.provenance["pretrained"] == {
        "source": "start.safetensors",
        "sha256": sha256_of(tmp_path / "start.safetensors"),
        "licence": UNKNOWN_LICENCE,
    }
    assert recipe_of(manifest).model.options == OWN[name]
    assert str(tmp_path) not in manifest.to_json()
