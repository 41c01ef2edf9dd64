"""The first tensor that departs is the broken one, and nothing departs in what is not broken."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import mutations
from bench.verifier_mutations import is_same_place
from converters import flatbuffer
from converters.layers import Layer, LayerReport, cosine_distance, difference
from converters.layers_tflite import compare_float, compare_quantized, module_of, scopes_of
from converters.torch_trace import trace

KINDS = (mutations.dropped_bias, mutations.transposed_kernel, mutations.swapped_entries)


@pytest.fixture(scope="module")
def traced(model, images):
    return trace(model, images[:4])


def broken(path: Path, mutation: mutations.Mutation, out: Path) -> str:
    """Write a broken copy; returns the name of the tensor that is wrong first."""
    copy = flatbuffer.read_model(path)
    where = mutation(copy, np.random.default_rng(0))
    assert where is not None
    flatbuffer.write_model(copy, out)
    return where


def test_a_trace_ends_in_what_the_model_answers(traced, reference):
    values = [tensor.value[:, 0] for tensor in traced]
    np.testing.assert_allclose(values[-1], reference["logits"][:4], rtol=1e-5, atol=1e-5)
    assert {"stem.0", "mixer.fc1", "attention.qkv"} <= {tensor.module for tensor in traced}


def test_sound_float_tensors_have_counterparts_and_none_departs(artifacts, traced, images):
    report = compare_float(artifacts["float32"], traced, images[:4], artifact="float32")
    assert report.first_departed is None
    known = [layer for layer in report.layers if layer.error is not None]
    assert len(known) > len(report.layers) / 3
    assert max(layer.error for layer in known) < 1e-5


@pytest.mark.parametrize("precision", ["static", "dynamic"])
def test_sound_quantized_tensors_do_not_depart(artifacts, images, precision):
    report = compare_quantized(
        artifacts[precision], artifacts["float32"], images[:4], artifact=precision, expected_images=images[:4]
    )
    assert report.first_departed is None
    assert max(layer.error or 0 for layer in report.layers) > 1e-3  # int8 it is


@pytest.mark.parametrize("mutation", KINDS)
def test_the_broken_float_layer_is_named(artifacts, traced, images, tmp_path, mutation):
    where = broken(artifacts["float32"], mutation, tmp_path / "broken.tflite")
    report = compare_float(tmp_path / "broken.tflite", traced, images[:4], artifact="float32")
    assert is_same_place(report.first_departed.name, where)


@pytest.mark.parametrize("mutation", [*KINDS, mutations.wrong_weight_scale, mutations.wrong_activation_scale])
def test_the_broken_int8_layer_is_named(artifacts, images, tmp_path, mutation):
    where = broken(artifacts["static"], mutation, tmp_path / "broken.tflite")
    report = compare_quantized(
        tmp_path / "broken.tflite", artifacts["float32"], images[:4], artifact="int8", expected_images=images[:4]
    )
    assert is_same_place(report.first_departed.name, where)


def test_sound_half_weights_do_not_depart_and_a_wrong_one_does(artifacts, images, tmp_path):
    def compare(path: Path) -> LayerReport:
        return compare_quantized(path, artifacts["float32"], images[:4], artifact="float16", expected_images=images[:4])

    report = compare(artifacts["float16"])
    assert report.first_departed is None
    assert 1e-5 < max(layer.error or 0 for layer in report.layers) < 4e-3
    copy = flatbuffer.read_model(artifacts["float16"])
    graph = flatbuffer.backbone(copy)
    widened = [op for op in graph.operators if flatbuffer.operator_name(copy, op) == "DEQUANTIZE"][3]
    buffer = copy.buffers[graph.tensors[int(widened.inputs[0])].buffer]
    weights = np.frombuffer(bytes(buffer.data), np.float16).copy()
    weights[np.abs(weights).argmax()] *= np.float16(0.99)
    buffer.data = np.frombuffer(weights.tobytes(), np.uint8)
    flatbuffer.write_model(copy, tmp_path / "broken.tflite")
    reader = next(op for op in graph.operators if int(widened.outputs[0]) in map(int, op.inputs))
    where = graph.tensors[int(reader.outputs[0])].name.decode()
    assert is_same_place(compare(tmp_path / "broken.tflite").first_departed.name, where)


def test_wrongly_processed_images_depart_at_the_input(artifacts, traced, images):
    report = compare_float(artifacts["float32"], traced, images[:4] * 1.1, artifact="float32")
    assert report.first_departed.place == "input"


def test_names_tell_modules():
    root = "converters.prepare.DeployFeatures"
    fused = f"{root}/a.Stem_stem/b.ReLU_act;;{root}/a.Stem_stem/b.Conv2d_conv1;1_quantized"
    assert scopes_of(fused) == (f"{root}/a.Stem_stem/b.ReLU_act", f"{root}/a.Stem_stem/b.Conv2d_conv1")
    assert module_of(fused) == "stem.act"
    assert scopes_of("features_features_output") == ()
    assert module_of("features_features_output") == ""


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8))
def test_everything_agrees_with_itself(values):
    array = np.array(values, np.float32)
    assert difference(array, array) == 0.0
    assert cosine_distance(array, array) == pytest.approx(0.0, abs=1e-9)


def test_what_is_not_finite_differs_as_much_as_can_be():
    assert difference(np.array([np.nan]), np.ones(1)) == float("inf")
    assert cosine_distance(np.array([np.inf]), np.ones(1)) == 1.0


def test_the_worst_come_first():
    def layer(name: str, error: float, own: float) -> Layer:
        return Layer(name=name, module="", kind="ADD", error=error, cosine_distance=0.0, own=own)

    layers = (layer("a", 0.1, 0.0), layer("b", 0.3, 3.0), layer("c", 0.9, 2.0))
    report = LayerReport(artifact="x", reference="y", layers=layers)
    assert [found.name for found in report.worst(2)] == ["b", "c"]
    assert report.first_departed.name == "b"
