"""TFLite files: what they answer, what they hold, and that their head learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from converters import flatbuffer, gates, tflite
from converters.errors import ConversionError, ParityError, UnsupportedOpError
from converters.head import PADDING_LABEL, UNUSED_CLASS_BIAS, TrainHead, empty_head, train_step
from converters.parity import compare
from converters.prepare import DeployFeatures, feature_dim
from device.engine import Engine
from tests.converters.tiny import INPUT_SHAPE, INPUT_SPEC, LABELS, MAX_CLASSES, TinyHybrid, make_images

PRECISIONS = ("float32", "float16", "static", "dynamic")


def features_of(path: Path, images: np.ndarray) -> np.ndarray:
    engine = Engine(path)
    return np.stack([engine.features(image[None]) for image in images])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_signatures_have_stable_names(artifacts, precision):
    signatures = Interpreter(str(artifacts[precision])).get_signature_list()
    assert {name: (set(io["inputs"]), set(io["outputs"])) for name, io in signatures.items()} == {
        "features": ({"images"}, {"features"}),
        "infer_f": ({"f", "W", "b"}, {"logits"}),
        "train_f": ({"f", "y", "W", "b", "lr"}, {"loss", "W_new", "b_new"}),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_go_in_and_out_as_float32(artifacts, precision):
    runner = Interpreter(str(artifacts[precision])).get_signature_runner("features")
    details = [*runner.get_input_details().values(), *runner.get_output_details().values()]
    assert [(tuple(item["shape"]), item["dtype"]) for item in details] == [
        (INPUT_SHAPE, np.float32),
        ((1, 72), np.float32),
    ]


# float32: rounding of another summation order. dynamic: 8-bit weights only. static: 8-bit activations through 9 layers
# of random weights, which amplify; a wrong scale or a lost bias gives less than .9.
COSINES = [("float32", 0.999999), ("float16", 0.99999), ("dynamic", 0.999), ("static", 0.99)]


@pytest.mark.parametrize(("precision", "min_cosine"), COSINES)
def test_features_match_torch(artifacts, images, reference, precision, min_cosine):
    parity = compare(reference["features"], features_of(artifacts[precision], images))
    assert parity.min_cosine > min_cosine


AGREEMENTS = [("float32", 1.0), ("float16", 1.0), ("dynamic", 0.95), ("static", 0.9)]


@pytest.mark.parametrize(("precision", "min_agreement"), AGREEMENTS)
def test_logits_match_torch(artifacts, model, images, reference, precision, min_agreement):
    weight, bias = head_of(model)
    parity = compare(reference["logits"], features_of(artifacts[precision], images) @ weight + bias)
    assert parity.argmax_agreement >= min_agreement


def head_of(model: TinyHybrid) -> tuple[np.ndarray, np.ndarray]:
    return model.head.weight.detach().numpy().T, model.head.bias.detach().numpy()


@pytest.mark.parametrize("precision", ["static", "dynamic"])
def test_quantized_weights_take_about_a_quarter(artifacts, precision):
    # only 38 k weights: names and structure, which do not shrink, are half of the int8 file
    overhead = 80_000
    assert artifacts[precision].stat().st_size < artifacts["float32"].stat().st_size / 4 + overhead
    assert flatbuffer.tensor_types(artifacts[precision])["features"]["INT8"] > 5


def test_half_weights_take_about_a_half_and_are_the_only_change(artifacts):
    saved = artifacts["float32"].stat().st_size - artifacts["float16"].stat().st_size
    types = {name: flatbuffer.tensor_types(artifacts[name])["features"] for name in ("float32", "float16")}
    assert saved > 0.45 * 4 * 38_000 - 20_000  # names of the widened tensors
    assert types["float16"]["FLOAT16"] == flatbuffer.operators(artifacts["float16"])["features"]["DEQUANTIZE"] > 5
    assert types["float32"].keys() == {"FLOAT32", "INT32"} & types["float32"].keys()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_partition(artifacts, precision):
    count, outside = gates.partitions(artifacts[precision])
    assert (count, dict(outside)) == (1, {})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_head_stays_float_and_learns(artifacts, precision):
    losses = gates.check_train_signature(artifacts[precision], steps=20, tolerance=1e-4)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_builtin_operations(artifacts, precision):
    gates.assert_builtin_ops(artifacts[precision])
    assert "CONV_2D" in flatbuffer.operators(artifacts[precision])["features"]


def test_batch_norm_is_folded(artifacts, model):
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    operations = flatbuffer.operators(artifacts["float32"])["features"]
    assert operations["CONV_2D"] + operations["DEPTHWISE_CONV_2D"] == convolutions
    assert operations["RSQRT"] == sum(
        isinstance(module, nn.LayerNorm) for module in model.modules()
    )  # none of a BatchNorm


def test_another_process_writes_the_same_bytes(artifacts, rebuilt):
    for precision, path in artifacts.items():
        assert path.read_bytes() == (rebuilt / f"{precision}.tflite").read_bytes(), precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_preprocessing_travels_inside(artifacts, precision):
    assert flatbuffer.read_metadata(artifacts[precision]) == INPUT_SPEC
    assert flatbuffer.read_metadata(artifacts[precision], "fieldvit.labels") is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_baked_head_answers_as_features_and_head(artifacts, model, images, precision, tmp_path):
    weight, bias = head_of(model)
    path = tflite.bake_head(artifacts[precision], weight, bias, tmp_path / "model.infer.tflite", labels=LABELS)
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    logits = np.stack([runner(images=image[None])["logits"][0] for image in images[:4]])
    np.testing.assert_allclose(logits, features_of(artifacts[precision], images[:4]) @ weight + bias, atol=1e-5)
    assert flatbuffer.read_metadata(path) == INPUT_SPEC
    assert flatbuffer.read_metadata(path, "fieldvit.labels") == list(LABELS)


def test_baked_head_that_does_not_fit_is_refused(artifacts, tmp_path):
    with pytest.raises(
        ConversionError, match=r"head weight \[71, 3\] and bias \[3\] do not fit a backbone of 72 features"
    ):
        tflite.bake_head(artifacts["float32"], np.zeros((71, 3)), np.zeros(3), tmp_path / "bad.tflite")


def test_learned_head_is_used_by_infer_f(artifacts):
    engine, rng = Engine(artifacts["static"]), np.random.default_rng(0)
    weight, bias = empty_head(72, MAX_CLASSES)
    bias[[1, 5]] = 0.0
    features = rng.standard_normal((8, 72)).astype(np.float32)
    labels = np.where(features[:, 0] > 0, 5, 1).astype(np.int32)
    for _ in range(50):
        out = engine.run("train_f", f=features, y=labels, W=weight, b=bias, lr=np.full(1, 0.1, np.float32))
        weight, bias = out["W_new"], out["b_new"]
    answers = [int(engine.run("infer_f", f=row[None], W=weight, b=bias)["logits"].argmax()) for row in features]
    assert answers == labels.tolist()
    untaught = [0, 2, 3, 4, 6]
    assert (weight[:, untaught] == 0).all()
    assert (bias[untaught] == UNUSED_CLASS_BIAS).all()


def test_padding_rows_do_not_count(artifacts):
    engine, rng = Engine(artifacts["float32"]), np.random.default_rng(0)
    weight, bias = rng.standard_normal((72, MAX_CLASSES)).astype(np.float32), np.zeros(MAX_CLASSES, np.float32)
    features, labels = (
        rng.standard_normal((8, 72)).astype(np.float32),
        np.array([0, 3, 6, *[PADDING_LABEL] * 5], np.int32),
    )
    out = engine.run("train_f", f=features, y=labels, W=weight, b=bias, lr=np.full(1, 0.1, np.float32))
    loss, weight_new, bias_new = train_step(features[:3], labels[:3], weight, bias, learning_rate=0.1)
    assert out["loss"][0] == pytest.approx(loss, abs=1e-4)
    np.testing.assert_allclose(out["W_new"], weight_new, atol=1e-5)
    np.testing.assert_allclose(out["b_new"], bias_new, atol=1e-5)


@pytest.mark.parametrize("label", [PADDING_LABEL, MAX_CLASSES, 2**31 - 1])
def test_a_batch_of_padding_changes_nothing(artifacts, label):
    weight, bias = np.ones((72, MAX_CLASSES), np.float32), np.zeros(MAX_CLASSES, np.float32)
    arrays = {"f": np.ones((8, 72), np.float32), "y": np.full(8, label, np.int32), "W": weight, "b": bias}
    out = Engine(artifacts["float32"]).run("train_f", **arrays, lr=np.ones(1, np.float32))
    assert out["loss"][0] == 0
    assert (out["W_new"] == weight).all()
    assert (out["b_new"] == bias).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 30.0]), learning_rate=st.floats(1e-3, 0.5))
def test_train_step_is_the_gradient_of_cross_entropy(seed, scale, learning_rate):
    rng = np.random.default_rng(seed)
    features, labels = (scale * rng.standard_normal((5, 6))).astype(np.float32), rng.integers(0, 3, 5).astype(np.int32)
    weight, bias = rng.standard_normal((6, 4)), rng.standard_normal(4)
    bias[3] = UNUSED_CLASS_BIAS
    parameters = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (weight, bias)]
    logits = torch.tensor(features, dtype=torch.float64) @ parameters[0] + parameters[1]
    expected = nn.functional.cross_entropy(logits, torch.tensor(labels).long())
    expected.backward()
    loss, weight_new, bias_new = train_step(features, labels, weight, bias, learning_rate=learning_rate)
    assert loss == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(weight_new, weight - learning_rate * parameters[0].grad.numpy(), atol=1e-9)
    np.testing.assert_allclose(bias_new, bias - learning_rate * parameters[1].grad.numpy(), atol=1e-9)


def test_torch_head_equals_its_twin():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((8, 6)), rng.integers(-1, 4, 8), rng.standard_normal((6, 4)), rng.standard_normal(4)]
    tensors = [torch.tensor(array, dtype=torch.int32 if array.dtype.kind == "i" else torch.float32) for array in arrays]
    out = TrainHead()(*tensors, torch.tensor([0.1]))
    loss, weight, bias = train_step(*arrays, learning_rate=0.1)
    assert out["loss"].item() == pytest.approx(loss, abs=1e-5)
    np.testing.assert_allclose(out["W_new"], weight, atol=1e-5)
    np.testing.assert_allclose(out["b_new"], bias, atol=1e-5)


def test_the_quickstart_model_converts_whole(field_model, tmp_path):
    images = make_images(24, size=32)
    float32 = tflite.convert_float(field_model, (1, 32, 32, 1), 16, tmp_path / "float32.tflite")
    static = tflite.quantize_static(float32, images[:16], tmp_path / "static.tflite")
    with torch.no_grad():
        expected = DeployFeatures(field_model)(torch.from_numpy(images))["features"].numpy()
    for path, min_cosine in ((float32, 0.999999), (static, 0.95)):  # random weights amplify 8-bit rounding
        assert compare(expected, features_of(path, images)).min_cosine > min_cosine
        assert gates.partitions(path)[0] == 1
        gates.assert_builtin_ops(path)
        gates.check_train_signature(path)
    assert static.stat().st_size < 0.4 * float32.stat().st_size


# --- the gates refuse what is wrong -----------------------------------------------------------------------------------


def test_gate_refuses_a_quantized_head(artifacts, tmp_path):
    model = flatbuffer.read_model(artifacts["static"])
    model.subgraphs[2].tensors[12].type = 9  # INT8, as calibrating every signature would make it
    flatbuffer.write_model(model, tmp_path / "int8.tflite")
    with pytest.raises(ConversionError, match="signature train_f holds INT8 tensors; it would not learn"):
        gates.check_train_signature(tmp_path / "int8.tflite")


def test_gate_refuses_a_missing_signature(artifacts, model, tmp_path):
    path = tflite.bake_head(artifacts["float32"], *head_of(model), tmp_path / "infer.tflite")
    with pytest.raises(ConversionError, match="has no signature infer_f, only serving_default"):
        gates.check_train_signature(path)


def test_gate_refuses_wrong_arithmetic(artifacts, tmp_path):
    model = flatbuffer.read_model(artifacts["float32"])
    subtract = [op for op in model.subgraphs[2].operators if flatbuffer.operator_name(model, op) == "SUB"]
    add = next(op for op in model.subgraphs[2].operators if flatbuffer.operator_name(model, op) == "ADD")
    last = subtract[-1]  # W - lr * gradient becomes W + lr * gradient
    last.opcodeIndex, last.builtinOptions, last.builtinOptionsType = (
        add.opcodeIndex,
        add.builtinOptions,
        add.builtinOptionsType,
    )
    flatbuffer.write_model(model, tmp_path / "wrong.tflite")
    with pytest.raises(ParityError, match=r"train_f differs from NumPy by .* at step 0"):
        gates.check_train_signature(tmp_path / "wrong.tflite")


def test_gate_refuses_flex_operations(artifacts, tmp_path):
    model = flatbuffer.read_model(artifacts["float32"])
    model.operatorCodes[0].customCode = b"FlexErf"
    flatbuffer.write_model(model, tmp_path / "flex.tflite")
    with pytest.raises(UnsupportedOpError, match="signature features uses FlexErf, which plain LiteRT cannot run"):
        gates.assert_builtin_ops(tmp_path / "flex.tflite")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_float_scopes_stay_float(artifacts, images, tmp_path):
    path = tflite.quantize_static(
        artifacts["float32"], images[:4], tmp_path / "mixed.tflite", float_scopes=["Sequential_stem"]
    )
    mixed, static = (flatbuffer.tensor_types(item)["features"]["INT8"] for item in (path, artifacts["static"]))
    assert 0 < mixed < static


def test_model_without_features_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"Linear has no forward_features\(images_nchw\)"):
        tflite.convert_float(nn.Linear(2, 2), INPUT_SHAPE, 3, tmp_path / "x.tflite")


def test_unpooled_features_are_refused(model, monkeypatch):
    monkeypatch.setattr(model, "forward_features", lambda images: images)
    with pytest.raises(ConversionError, match=r"must return \[B, D\], got \[1, 1, 16, 16\]"):
        feature_dim(model, INPUT_SHAPE)


@pytest.mark.parametrize("shape", [(2, 16, 16, 1), (1, 16, 16), (1, 0, 16, 1)])
def test_bad_input_shape_is_refused(model, shape):
    with pytest.raises(ConversionError, match=r"input shape must be \(1, H, W, C\)"):
        feature_dim(model, shape)


def test_unconvertible_model_is_named(tmp_path):
    class Unconvertible(TinyHybrid):
        def forward_features(self, images_nchw):
            return super().forward_features(images_nchw) * float(images_nchw.sum() + 1)

    with pytest.raises(ConversionError, match="litert-torch cannot convert Unconvertible"):
        tflite.convert_float(Unconvertible().eval(), INPUT_SHAPE, 3, tmp_path / "x.tflite")


def test_modes_are_restored(tmp_path):
    model = TinyHybrid().train()
    model.stem.eval()
    feature_dim(model, INPUT_SHAPE)
    assert [part.training for part in (model, model.stem, model.mixer)] == [True, False, True]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            np.zeros((4, 16, 15, 1), np.float32),
            r"calibration must be float32 \[N, 16, 16, 1\], got float32 \[4, 16, 15, 1\]",
        ),
        (np.zeros((4, 16, 16, 1), np.uint8), "got uint8"),
        (np.zeros((0, 16, 16, 1), np.float32), r"got float32 \[0, 16, 16, 1\]"),
        (np.full((1, 16, 16, 1), np.nan, np.float32), "calibration holds NaN"),
    ],
)
def test_bad_calibration_is_refused(artifacts, tmp_path, calibration, message):
    with pytest.raises(ConversionError, match=message):
        tflite.quantize_static(artifacts["float32"], calibration, tmp_path / "x.tflite")


def test_not_a_tflite_file(tmp_path):
    (tmp_path / "x.tflite").write_bytes(b"no")
    with pytest.raises(ConversionError, match="not a readable TFLite file"):
        flatbuffer.read_model(tmp_path / "x.tflite")


def test_deploy_form_is_nhwc(model, images, reference):
    with torch.no_grad():
        nchw = torch.from_numpy(images[:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(
            DeployFeatures(model)(torch.from_numpy(images[:2]))["features"], model.forward_features(nchw)
        )
