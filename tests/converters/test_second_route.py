"""The second route: errors without its environment, and the real one where it was made (`make onnx2tf-env`)."""

import numpy as np
import pytest
import torch
from torch import nn

from converters import flatbuffer, routes, second_route, tflite
from converters.environments import ONNX2TF
from converters.errors import ConversionError, MissingEnvironmentError, RefusedModelError
from converters.gates import assert_builtin_ops, check_train_signature
from converters.isolate import opened
from converters.parity import compare
from converters.runners import open_features, open_outputs
from tests.converters.tiny import INPUT_SHAPE, MAX_CLASSES
from tests.support.environments import needs_onnx2tf, without_environments, write_interpreter

LIMIT = 1e-4


class CeilPool(nn.Module):
    """A pool that litert-torch leaves as a StableHLO operation, which LiteRT cannot run; onnx2tf pads and divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 16, 2, 2), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward_features(self, images_nchw):
        pooled = nn.functional.avg_pool2d(self.stem(images_nchw), 3, 2, 1, ceil_mode=True, count_include_pad=False)
        return nn.functional.gelu(self.body(pooled.flatten(2).mean(-1)))


class DilatedPool(CeilPool):
    """A pool that neither route can express."""

    def forward_features(self, images_nchw):
        return nn.functional.max_pool2d(self.stem(images_nchw), 2, 1, dilation=2).mean((2, 3))


def make(kind):
    torch.manual_seed(0)
    return kind().eval()


def features_of(model, images):
    with torch.no_grad():
        return model.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_without_its_environment_it_says_how_to_make_it(model, tmp_path, monkeypatch):
    without_environments(monkeypatch, tmp_path)
    with pytest.raises(MissingEnvironmentError, match="make it with: make onnx2tf-env"):
        second_route.convert_backbone(model, INPUT_SHAPE, tmp_path / "model.tflite")


@pytest.mark.parametrize(
    ("code", "said", "cause"),
    [
        (1, "ERROR: onnx_op_name: node_pool\nValueError: no such\n axis", "at node_pool: ValueError: no such"),
        (1, "\x1b[31mERROR:\x1b[0m onnx_op_name: \x1b[1mn1\x1b[0m\nKeyError: 'x'\n", "at n1: KeyError: 'x'"),
        (1, "a.b.ConverterError: Some ops\nFlex ops: FlexErf\n", "a.b.ConverterError: Some ops Flex ops: FlexErf"),
        (1, "ValueError: first\nthen\nTypeError: last\n", "TypeError: last"),
        (3, "something else", "something else"),
        (3, "", "exit code 3"),
        (-6, "ValueError: no matter", "its process ended with signal 6"),
    ],
)
def test_what_a_child_said_comes_to_one_line(code, said, cause):
    assert second_route.cause_of(code, said) == cause


def test_a_child_that_fails_is_quoted_and_leaves_nothing(model, tmp_path, monkeypatch):
    without_environments(monkeypatch, tmp_path)
    write_interpreter(ONNX2TF, tmp_path, "echo 'ValueError: no such axis' >&2; exit 1")
    with pytest.raises(RefusedModelError, match=r"^onnx2tf cannot convert TinyHybrid: ValueError: no such axis$"):
        second_route.convert_backbone(model, INPUT_SHAPE, tmp_path / "model.tflite")
    assert not (tmp_path / "model.tflite").exists()


def test_exchanged_axes_are_refused(artifacts):
    path, shapes = artifacts["float32"], {"images": INPUT_SHAPE, "features": (1, 72)}
    second_route.require_shapes(path, "features", shapes, with_logits=False)
    exchanged = shapes | {"images": (1, 1, 16, 16)}
    with pytest.raises(ConversionError, match=r"onnx2tf gave .* expected .*'images': \(1, 1, 16, 16\)"):
        second_route.require_shapes(path, "features", exchanged, with_logits=False)
    with pytest.raises(ConversionError, match="onnx2tf gave"):
        second_route.require_shapes(path, "features", shapes, with_logits=True)


@pytest.mark.slow
def test_litert_torch_is_taken_where_it_can(model, artifacts, tmp_path):
    path = tmp_path / "model.tflite"
    assert routes.convert_float(model, INPUT_SHAPE, MAX_CLASSES, path) == routes.FIRST
    assert flatbuffer.graph_digest(path, "features") == flatbuffer.graph_digest(artifacts["float32"], "features")


def test_a_refused_model_without_the_second_route_has_both_reasons(tmp_path, monkeypatch):
    without_environments(monkeypatch, tmp_path)
    with pytest.raises(MissingEnvironmentError, match=r"STABLEHLO_REDUCE_WINDOW.*make it with: make onnx2tf-env"):
        routes.convert_float(make(CeilPool), INPUT_SHAPE, MAX_CLASSES, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_takes_no_other_route(tmp_path):
    with pytest.raises(ConversionError, match="has no forward_features"):
        routes.convert_float(nn.Linear(2, 2), INPUT_SHAPE, MAX_CLASSES, tmp_path / "model.tflite")


@needs_onnx2tf
@pytest.mark.slow
def test_both_routes_make_the_same_of_a_model(model, images, reference, artifacts, tmp_path):
    path = second_route.convert_classifier(model, INPUT_SHAPE, tmp_path / "model.tflite")
    assert_builtin_ops(path)
    with opened(open_outputs, path) as outputs_of, opened(open_features, artifacts["float32"]) as features:
        outputs, ours = outputs_of(images), features(images)
    assert relative(outputs["features"], ours) <= LIMIT
    for name, expected in reference.items():
        assert relative(outputs[name], expected) <= LIMIT
        assert compare(expected, outputs[name]).argmax_agreement == 1.0


@needs_onnx2tf
@pytest.mark.slow
def test_what_litert_torch_refuses_takes_the_second_route_with_the_same_signatures(images, tmp_path, caplog):
    model, path = make(CeilPool), tmp_path / "model.tflite"
    spec = {"height": 16}
    assert routes.convert_float(model, INPUT_SHAPE, MAX_CLASSES, path, input_spec=spec) == routes.SECOND
    assert "CeilPool was converted by onnx2tf, because" in caplog.text
    assert flatbuffer.operators(path).keys() == {"features", "infer_f", "train_f"}
    assert flatbuffer.read_metadata(path) == spec
    check_train_signature(path)
    with opened(open_features, path) as features:
        assert relative(features(images), features_of(model, images)) <= LIMIT
    quantized = tflite.quantize_static(path, images[:16], tmp_path / "int8.tflite")
    check_train_signature(quantized)
    with opened(open_features, quantized) as features:
        assert compare(features_of(model, images), features(images)).min_cosine > 0.99
    again = tmp_path / "again.tflite"
    routes.convert_float(model, INPUT_SHAPE, MAX_CLASSES, again, input_spec=spec)
    assert again.read_bytes() == path.read_bytes()


@needs_onnx2tf
@pytest.mark.slow
def test_what_neither_route_takes_is_refused_with_both_reasons(tmp_path):
    with pytest.raises(ConversionError, match=r"STABLEHLO_REDUCE_WINDOW.*the second route neither: .*Dilation2D"):
        routes.convert_float(make(DilatedPool), INPUT_SHAPE, MAX_CLASSES, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())
