"""The ONNX half of the second route: what onnxruntime makes of it is what PyTorch says."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from converters.errors import ConversionError, RefusedModelError
from converters.onnx_export import OPSET, export_onnx, flatten_layer_norms
from converters.prepare import DeployClassifier
from tests.converters.tiny import INPUT_SHAPE, TinyHybrid

onnx = pytest.importorskip("onnx", reason="onnx is not installed; pip install 'fieldvit[onnx]'")


class WideNorm(nn.Module):
    """A norm over two axes, as MobileViTv2 has it in its deploy form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm((8, 16)), nn.Linear(8, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward_features(self, images_nchw):
        return nn.functional.silu(self.norm(self.stem(images_nchw).flatten(2))).mean(2)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return export_onnx(model, INPUT_SHAPE, tmp_path_factory.mktemp("onnx") / "model.onnx")


def run(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    rows = [session.run(None, {"images": np.moveaxis(image[None], 3, 1)}) for image in images]
    return dict(zip(names, map(np.concatenate, zip(*rows, strict=True)), strict=True))


def test_onnxruntime_answers_as_pytorch(exported, images, reference):
    answers = run(exported, images)
    assert answers.keys() == {"features", "logits"}
    for name, values in answers.items():
        np.testing.assert_allclose(values, reference[name], rtol=1e-4, atol=1e-5)


def test_gelu_stays_one_operation(exported):
    graph = onnx.load(exported)
    kinds = [node.op_type for node in graph.graph.node]
    assert graph.opset_import[0].version == OPSET
    assert kinds.count("Gelu") == 2
    assert "Erf" not in kinds
    assert [size.dim_value for size in graph.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 16, 16]


def test_norms_over_several_axes_are_flattened_exactly(tmp_path):
    torch.manual_seed(0)
    model, images = WideNorm().eval(), np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
    path = export_onnx(model, (1, 16, 16, 3), tmp_path / "model.onnx")
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    (norm,) = [node for node in graph.graph.node if node.op_type == "LayerNormalization"]
    scale = next(constant for constant in graph.graph.initializer if constant.name == norm.input[1])
    assert len(scale.dims) == 1
    with torch.no_grad():
        expected = DeployClassifier(model)(torch.from_numpy(images))
    for name, values in run(path, images).items():
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-4, atol=1e-6)


def test_norms_over_one_axis_are_left_alone(exported):
    graph = onnx.load(exported)
    before = graph.SerializeToString(deterministic=True)
    assert flatten_layer_norms(graph).SerializeToString(deterministic=True) == before


@pytest.mark.slow
def test_features_alone_and_the_model_s_mode(tmp_path):
    model = TinyHybrid().train()
    graph = onnx.load(export_onnx(model, INPUT_SHAPE, tmp_path / "model.onnx", with_logits=False))
    assert [output.name for output in graph.graph.output] == ["features"]
    assert model.training


def test_missing_packages_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConversionError, match=r"needs onnxscript, .* pip install 'fieldvit\[onnx\]'"):
        export_onnx(model, INPUT_SHAPE, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path):
    class Unexportable(TinyHybrid):
        def forward_features(self, images_nchw):
            return super().forward_features(images_nchw) * torch.linalg.svdvals(images_nchw[0, 0])[0]  # not in ONNX

    with pytest.raises(RefusedModelError, match=r"torch\.onnx cannot export Unexportable"):
        export_onnx(Unexportable().eval(), INPUT_SHAPE, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
