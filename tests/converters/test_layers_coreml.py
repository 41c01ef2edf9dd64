"""Tensors of Core ML packages: nothing departs in what is sound, and what is broken is named."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from converters import coreml
from converters.layers import LayerReport
from converters.layers_coreml import compare_package, plain
from converters.torch_trace import trace
from tests.converters.tiny import INPUT_SHAPE, INPUT_SPEC, LABELS

Break = Callable[[nn.Module], str]


@pytest.fixture(scope="module")
def reference_package(model, tmp_path_factory) -> Path:
    return convert(model, tmp_path_factory.mktemp("reference") / "float32.mlpackage", is_half=False)


@pytest.fixture(scope="module")
def traced(model, images):
    return trace(model, images[:2])


def convert(model: nn.Module, path: Path, *, is_half: bool = True) -> Path:
    return coreml.convert(model, INPUT_SHAPE, path, input_spec_metadata=INPUT_SPEC, labels=LABELS, is_half=is_half)


def compare(path: Path, reference: Path, traced, images: np.ndarray, form: str = "float16") -> LayerReport:
    return compare_package(
        path, reference, traced, images, artifact=form, is_half=form == "float16", expected_images=images
    )


def test_a_sound_package_does_not_depart(package, reference_package, traced, images):
    report = compare(package, reference_package, traced, images[:2])
    assert report.first_departed is None
    assert sum(layer.own > 0 for layer in report.layers) > 8  # operations that were repeated
    known = [layer.error for layer in report.layers if layer.error is not None]
    assert len(known) > len(report.layers) / 2
    assert 0 < max(known) < 0.02


@pytest.mark.parametrize(
    "form", [pytest.param("w8", marks=pytest.mark.slow), "w8a8", pytest.param("palette6", marks=pytest.mark.slow)]
)
def test_a_sound_quantized_package_does_not_depart(forms, reference_package, traced, images, form):
    report = compare(forms[form], reference_package, traced, images[:2], form)
    assert report.first_departed is None
    assert sum(layer.own > 0 for layer in report.layers) > 8


def swapped_entries(model: nn.Module) -> str:
    weights = model.mixer.fc1.weight.data.reshape(-1)
    weights[[0, 1]] = weights[[1, 0]]
    return "mixer.fc1"


def dropped_bias(model: nn.Module) -> str:
    model.attention.qkv.bias.data.zero_()
    return "attention.qkv"


def scaled_head(model: nn.Module) -> str:
    model.head.weight.data.mul_(1.05)
    return "head"


@pytest.mark.parametrize(
    "break_one", [swapped_entries, *(pytest.param(b, marks=pytest.mark.slow) for b in (dropped_bias, scaled_head))]
)
def test_the_broken_layer_is_named(model, reference_package, traced, images, tmp_path, break_one: Break):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        where = break_one(broken)
    package = convert(broken, tmp_path / "broken.mlpackage")
    report = compare(package, reference_package, traced, images[:2])
    assert report.first_departed.module == where


def test_wrongly_processed_images_depart_at_the_input(package, reference_package, traced, images):
    report = compare_package(
        package,
        reference_package,
        traced,
        images[:2] * 1.1,
        artifact="float16",
        is_half=True,
        expected_images=images[:2],
    )
    assert report.first_departed.place == "input"


@pytest.mark.parametrize("name", ["linear_1", "linear_1_cast_fp16", "linear_1_cast_fp32", "linear_1_fp16"])
def test_names_of_nodes(name):
    assert plain(name) == "linear_1"
