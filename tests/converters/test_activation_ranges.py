"""Calibration in PyTorch: the ranges that images give, and codes that hold them."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from converters.activation_ranges import AffineInt8, calibrate, half_scales
from converters.errors import ConversionError
from tests.converters.tiny import TinyHybrid

BOUNDS = st.floats(-1e3, 1e3, width=32)


@given(BOUNDS, BOUNDS)
@example(0.0, 0.0004298108397051692)  # a subnormal scale
def test_codes_hold_the_range_and_zero(first, second):
    low, high = min(first, second), max(first, second)
    codes = AffineInt8.from_range(low, high)
    for value in (low, 0.0, high):
        code = np.clip(np.round(value / codes.scale) + codes.zero_point, -128, 127)
        # half a step for rounding, half for the zero point; the scale's own rounding never clips
        assert abs((code - codes.zero_point) * codes.scale - value) <= codes.scale * 1.001
    assert codes.scale <= max((high - low) / 255, max(high, -low, 0) / 255) * (1 + 2**-10) + 2.0**-24  # the finest
    assert codes.scale == float(np.float16(codes.scale))
    assert (0 + codes.zero_point - codes.zero_point) * codes.scale == 0


def test_scales_are_exact_in_half_and_never_zero():
    assert half_scales(np.array([0.1, 0.0, 1e-12])).tolist() == [float(np.float16(0.1)), 2.0**-24, 2.0**-24]


def test_ranges_are_those_of_the_images(model, images):
    seen = {}
    layers = {"stem.0": model.stem[0], "fc1": model.fc1}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(torch.from_numpy(images[:5]).permute(0, 3, 1, 2))  # all at once
    for handle in handles:
        handle.remove()
    found = calibrate(model, layers, images[:5])  # one by one
    for name, inputs in seen.items():
        expected = AffineInt8.from_range(float(inputs.min()), float(inputs.max()))
        assert found[name].scale == pytest.approx(expected.scale, rel=1e-3)  # other sums, then float16
        assert abs(found[name].zero_point - expected.zero_point) <= 1


def test_the_model_is_left_as_it_was(images):
    model = TinyHybrid().train()
    calibrate(model, {"fc1": model.fc1}, images[:1])
    assert model.training
    assert not model.fc1._forward_pre_hooks


@pytest.mark.parametrize("bad", [np.zeros((0, 16, 16, 1), np.float32), np.zeros((1, 16, 16, 1)), np.zeros((16, 16))])
def test_other_images_are_refused(model, bad):
    with pytest.raises(ConversionError, match=r"calibration images must be float32 \[N, H, W, C\]"):
        calibrate(model, {}, bad)


def test_a_layer_that_never_runs_is_named(model, images):
    with pytest.raises(ConversionError, match="layer spare is not run"):
        calibrate(model, {"spare": nn.Linear(2, 2)}, images[:1])


def test_values_that_are_not_finite_are_named(model, images):
    broken = images[:2].copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ConversionError, match=r"layer stem\.0 gets values that are not finite"):
        calibrate(model, {"stem.0": model.stem[0]}, broken)
