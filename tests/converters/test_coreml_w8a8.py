"""int8 weights and activations: the saved package holds our numbers, consumer by consumer, and computes with them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from converters import coreml, coreml_w8a8
from converters.activation_ranges import AffineInt8
from converters.coreml_w8a8 import (
    QuantizedLayer,
    int8_layers,
    quantize,
    quantize_per_channel,
    read_int8_layers,
    require_int8_layers,
)
from converters.errors import ConversionError
from converters.mil import MilProgram
from converters.parity import compare
from converters.prepare import DeployClassifier
from tests.converters.test_coreml import files_of, run
from tests.converters.tiny import INPUT_SHAPE, INPUT_SPEC, LABELS, TinyHybrid

FACTS = {"input_spec_metadata": INPUT_SPEC, "labels": LABELS}


class AddedBranches(nn.Module):
    """Two quantized branches whose sum is quantized again: what `REMOVED_PASS` would rewrite. And a shared input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward_features(self, images_nchw):
        return self.last(self.third(self.first(images_nchw) + self.second(images_nchw)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def quantized(model, images):
    return quantize(model, images[:32])


def answers(model, images):
    with torch.no_grad():
        return {name: value.numpy() for name, value in DeployClassifier(model)(torch.from_numpy(images)).items()}


def test_saved_package_holds_our_numbers_for_every_consumer(forms, quantized):
    """In execution order, which the converter keeps: scales, zero points and int8 weights, not only somewhere."""
    expected, found = int8_layers(quantized), read_int8_layers(forms["w8a8"])
    assert len(expected) == len(found) == 8  # all layers but the head
    by_shape = {layer.weight_codes.tobytes(): layer for layer in expected}
    for layer in found:
        ours = by_shape[layer.weight_codes.tobytes()]
        assert layer.activation == ours.activation
        np.testing.assert_array_equal(layer.weight_scales, ours.weight_scales)


def test_numbers_survive_additions_and_shared_inputs(images, tmp_path):
    torch.manual_seed(0)
    model = AddedBranches().eval()
    path = coreml_w8a8.convert(
        model, INPUT_SHAPE, tmp_path / "x.mlpackage", calibration_images=images[:8], is_half=False, **FACTS
    )
    found = read_int8_layers(path)
    assert len(found) == 4
    assert sum(layer.activation == found[0].activation for layer in found) == 2  # first and second see the images
    expected = answers(quantize(model, images[:8]), images[:4])["logits"]
    np.testing.assert_allclose(run(MilProgram(path), images[:4])["logits"], expected, atol=1e-5)


# float16 sums land on the other side of a rounding edge now and then: one step of 255
def test_package_computes_what_pytorch_rounds(forms, quantized, images):
    outputs = run(MilProgram(forms["w8a8"], round_to_half=True), images[:12])
    assert compare(answers(quantized, images[:12])["features"], outputs["features"]).min_cosine > 0.9995


# 8 bits of a range that a tail stretches leave 0.5 to 1 % of an activation, over eight layers
def test_answers_stay_close_on_images_that_were_not_calibrated_with(forms, reference, images):
    parity = compare(reference["logits"][32:], run(MilProgram(forms["w8a8"]), images[32:])["logits"])
    assert parity.min_cosine > 0.998
    assert parity.argmax_agreement >= 0.9  # one of sixteen may be a tie


def test_weights_take_a_byte_each(forms, package, quantized):
    saved = sum(layer.weight_codes.size for layer in int8_layers(quantized))
    before, after = ((path / coreml.WEIGHTS).stat().st_size for path in (package, forms["w8a8"]))
    assert after < before - 0.8 * saved  # scales and 64-byte headers take some


def test_another_process_writes_the_same_bytes(forms, rebuilt):
    assert files_of(forms["w8a8"]) == files_of(rebuilt / forms["w8a8"].name)


def test_metadata_travels_along(forms):
    assert coreml.read_metadata(forms["w8a8"]) == INPUT_SPEC
    assert coreml.read_metadata(forms["w8a8"], "fieldvit.labels") == list(LABELS)


def test_the_model_is_left_alone_and_its_head_is_float(model, quantized):
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert type(quantized.head) is nn.Linear
    assert type(quantized.fc1) is QuantizedLayer
    assert (quantized.fc1.in_features, quantized.fc1.out_features) == (48, 96)


def test_a_package_with_other_numbers_is_refused(forms, quantized):
    layers = int8_layers(quantized)
    broken = coreml_w8a8.Int8Layer("fc1", AffineInt8(0.5, 0), layers[0].weight_scales, layers[0].weight_codes)
    with pytest.raises(ConversionError, match="no layer has the scale, zero point and int8 weights of fc1"):
        require_int8_layers(forms["w8a8"], [*layers, broken])
    with pytest.raises(ConversionError, match="8 layers compute in int8, expected 9"):
        require_int8_layers(forms["w8a8"], [*layers, layers[0]])


def test_float_and_weight_only_packages_have_no_int8_layer(package, forms):
    assert read_int8_layers(package) == read_int8_layers(forms["w8"]) == []


def test_unsigned_codes_without_a_zero_point_read_as_the_signed_ones():
    def variable(**values):
        return SimpleNamespace(val=values.get("val"), dtype=SimpleNamespace(is_unsigned=lambda: values.get("unsigned")))

    inputs = {"input": variable(unsigned=True), "scale": variable(val=np.float32(0.5))}
    operation = SimpleNamespace(inputs=inputs)
    assert coreml_w8a8._read_activation(operation) == AffineInt8(0.5, -128)


def test_a_channel_of_zeros_stays_zero():
    codes, scales = quantize_per_channel(np.array([[0, 0], [1, -2]], np.float32))
    assert codes.tolist() == [[0, 0], [64, -127]]  # 1 / (2 / 127) = 63.5, and the scale is rounded down
    assert (scales > 0).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3, 3)])
def test_weights_are_off_by_half_a_step(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, scales = quantize_per_channel(weight)
    scales = scales.reshape(-1, *[1] * (len(shape) - 1))
    # the largest one by a little more, where float16 rounds the scale down
    assert (np.abs(codes * scales - weight) <= scales * (0.5 + 127 / 2048)).all()


def test_a_layer_that_sees_only_weights_is_left_to_be_folded(images):
    class WithTokens(AddedBranches):
        def __init__(self):
            super().__init__()
            self.token, self.query = nn.Parameter(torch.ones(1, 6)), nn.Linear(6, 6)

        def forward_features(self, images_nchw):
            return super().forward_features(images_nchw) * self.query(self.token)

    found = quantize(WithTokens().eval(), images[:2])
    assert {layer.name for layer in int8_layers(found)} == {"first", "second", "third", "last"}


def test_what_cannot_be_quantized_is_named(images, tmp_path):
    class NoLayers(AddedBranches):
        def forward_features(self, images_nchw):
            return images_nchw.flatten(1)[:, :6]

    with pytest.raises(ConversionError, match="NoLayers has no Conv2d or Linear outside its head"):
        quantize(NoLayers(), images[:1])
    with pytest.raises(ConversionError, match=r"must end in \.mlpackage"):
        coreml_w8a8.convert(TinyHybrid(), INPUT_SHAPE, tmp_path / "x", calibration_images=images[:1], **FACTS)
