"""Variants with options of a recipe: built, counted, saved and loaded again; every mistake is named."""

import pytest
import torch

from host.errors import ModelError, RecipeError
from host.models.checkpoint import Origin, load_model, save_model
from host.models.measure import count_parameters
from host.models.options import build_model, option_names, with_options
from host.models.registry import find_model, list_models

STAGES = [
    {"num_conv": 1, "conv_width": 32},
    {"num_conv": 1, "conv_width": 32, "transformer_width": 128, "sr_ratio": 2, "repeats": 1},
]
OWN = {
    "nextvit/field-32": {"stages": STAGES, "drop_path": 0, "image_size": 48},
    "mobileformer/field-32": {"rows": [[2, 16, 1], [3, 32, 2]], "num_tokens": 2},
    "mobilevit/xxs": {"widths": [16, 16, 24, 24, 32], "image_size": 128},
    "cnn/small": {"width": 8},
    "deit/field-32": {"widths": [{"num_heads": 2, "qk_dim": 16, "v_dim": 32, "mlp_dim": 64}] * 2, "drop_path": 0.1},
    "ninformer/field-32": {"depth": 2, "shared_norm": False},
    "efficientformer/field-32": {"widths": [24, 48], "depths": [1, 2]},
    "efficientformerv2/s0": {"distilled": False, "image_size": 192},
    "gcab/field-32": {"depth": 2, "embed_dim": 64},
}
SHAPE = {"num_classes": 5, "in_chans": 1}


def own_entry(name):
    return with_options(find_model(*name.split("/")), OWN[name])


@pytest.mark.parametrize("name", OWN)
def test_a_model_with_options_is_counted_and_comes_back_from_its_file(name, tmp_path):
    entry, path = own_entry(name), tmp_path / "own.safetensors"
    assert count_parameters(entry.create()) == entry.parameters < find_model(*name.split("/")).parameters
    assert not entry.is_exact
    model = build_model(entry, **SHAPE, seed=3).eval()
    save_model(model, path, Origin(family=entry.family, variant=entry.variant, options=OWN[name]))
    images = torch.rand(2, 1, entry.image_size, entry.image_size)
    for options in (None, OWN[name]):
        loaded = load_model(path, entry.family, entry.variant, **SHAPE, options=options)
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_equal_models_give_equal_files(tmp_path):
    entry, origin = own_entry("cnn/small"), Origin(family="cnn", variant="small", options=OWN["cnn/small"])
    for name in ("a", "b"):
        save_model(build_model(entry, **SHAPE), tmp_path / name, origin)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("family", "variant", "options", "wanted"),
    [("cnn", "small", {}, "cnn/small"), ("deit", "field-32", None, "deit/field-32")],
)
def test_a_file_of_another_model_is_refused_by_name(tmp_path, family, variant, options, wanted):
    origin = Origin(family="cnn", variant="small", options={"width": 8})
    save_model(build_model(own_entry("cnn/small"), **SHAPE), tmp_path / "own.safetensors", origin)
    with pytest.raises(ModelError, match=rf"holds a cnn/small with options {{'width': 8}}, not a {wanted}"):
        load_model(tmp_path / "own.safetensors", family, variant, **SHAPE, options=options)


def test_a_file_that_does_not_say_what_it_holds_is_loaded_as_what_is_asked_for(tmp_path):
    save_model(build_model(own_entry("cnn/small"), **SHAPE), tmp_path / "own.safetensors")
    load_model(tmp_path / "own.safetensors", "cnn", "small", **SHAPE, options={"width": 8})
    with pytest.raises(ModelError, match="holds other weights than cnn/small needs"):
        load_model(tmp_path / "own.safetensors", "cnn", "small", **SHAPE)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nextvit/field-32", {"stage": []}, "nextvit/field-32 has no option 'stage'"),
        ("nextvit/field-32", {"num_classes": 3}, "nextvit/field-32 has no option 'num_classes'"),
        ("nextvit/field-32", {"stages": [{"num_conv": "x"}]}, r"\(stages\) make no model: .*num_conv: expected int"),
        (
            "nextvit/field-32",
            {"stages": [{"convs": 1}]},
            r"stages\[0\]: unknown key 'convs'; known keys are conv_width",
        ),
        (
            "nextvit/field-32",
            {"stages": [{"num_conv": 1, "conv_width": 33}]},
            "multiples of 32, the head width, got 33",
        ),
        ("nextvit/field-32", {"drop_path": 2.0}, "drop_path must be"),
        ("deit/field-32", {"image_size": [32]}, "image_size: expected int"),
        ("mobileformer/field-32", {"rows": [[1, 16, 1], [2, 32]]}, r"\(rows\) make no model"),
        ("cnn/small", {"width": -1}, r"\(width\) make no model"),
    ],
)
def test_a_mistake_names_option_model_and_what_there_is(name, options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        with_options(find_model(*name.split("/")), options)
    assert f"options of {name} are " in str(caught.value)


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
def test_every_model_lists_its_options(entry):
    names = option_names(entry)
    assert set(names).isdisjoint({"num_classes", "in_chans", "options"})
    assert with_options(entry, {}) is entry
