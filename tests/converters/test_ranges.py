"""Int8 ranges: all that calibration saw; and around zero on the right of products, so the graph stays in one partition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converters import flatbuffer, gates, tflite
from converters.macs import macs_by_type
from converters.symmetric import products_with_constants, right_operands, with_symmetric
from device.engine import Engine

SIZE, CHANNELS, HEADS = 8, 32, 2


class TinyAttention(nn.Module):
    """Attention over the pixels of an image, with values far from zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, CHANNELS, 1)
        self.qkv = nn.Conv2d(CHANNELS, 3 * CHANNELS, 1)
        self.head = nn.Linear(CHANNELS, 4)
        with torch.no_grad():
            self.qkv.bias[2 * CHANNELS :] += 3  # values, whose range as calibrated is not around zero

    def forward_features(self, images_nchw: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.embed(images_nchw)).flatten(2)  # [B, 3C, N]
        q, k, v = qkv.reshape(1, 3, HEADS, CHANNELS // HEADS, -1).unbind(1)  # [B, heads, C / heads, N]
        attention = (q.transpose(2, 3) @ k).softmax(dim=-1)  # [B, heads, N, N]
        return (attention @ v.transpose(2, 3)).transpose(2, 3).flatten(1, 2).mean(dim=-1)  # [B, C]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    images = np.random.default_rng(0).standard_normal((8, SIZE, SIZE, 3), dtype=np.float32)
    path = tflite.convert_float(TinyAttention().eval(), (1, SIZE, SIZE, 3), 4, folder / "float.tflite")
    return path, tflite.quantize_static(path, images, folder / "int8.tflite"), images


def test_products_are_integers_in_one_partition(files):
    path, int8_path, _ = files
    assert macs_by_type(int8_path).keys() == {"INT8"}
    assert macs_by_type(int8_path).total() == macs_by_type(path)["FLOAT32"]
    assert gates.partitions(int8_path) == (1, {})


def test_macs_are_those_of_the_layers(files):
    path, _, _ = files
    tokens = SIZE * SIZE
    assert macs_by_type(path)["FLOAT32"] == tokens * CHANNELS * (3 + 3 * CHANNELS) + 2 * tokens * tokens * CHANNELS


def test_every_right_operand_has_the_zero_point_0(files):
    path, int8_path, _ = files
    names = right_operands(path)
    model = flatbuffer.read_model(int8_path)
    graph = flatbuffer.subgraph_of(model, flatbuffer.FEATURES)
    products = [op for op in graph.operators if flatbuffer.operator_name(model, op) == "BATCH_MATMUL"]
    assert len(products) == 2
    assert len(names) >= 2
    for operator in products:
        assert list(graph.tensors[operator.inputs[1]].quantization.zeroPoint) == [0]


class TalkingHeads(TinyAttention):
    """Heads that are mixed by a constant matrix."""

    def forward_features(self, images_nchw: torch.Tensor) -> torch.Tensor:
        features = self.embed(images_nchw).reshape(1, HEADS, -1)  # [B, heads, C / heads * N]
        mixed = torch.matmul(torch.tensor([[1.0, 0.5], [-0.25, 2.0]]), features)  # [B, heads, C / heads * N]
        return mixed.reshape(1, CHANNELS, -1).mean(dim=-1)  # [B, C]


def test_products_with_a_constant_stay_float(tmp_path):
    images = np.random.default_rng(0).standard_normal((8, SIZE, SIZE, 3), dtype=np.float32)
    path = tflite.convert_float(TalkingHeads().eval(), (1, SIZE, SIZE, 3), 4, tmp_path / "float.tflite")
    assert len(products_with_constants(path)) == 1
    int8_path = tflite.quantize_static(path, images, tmp_path / "int8.tflite")
    assert macs_by_type(int8_path)["FLOAT32"] == HEADS * HEADS * CHANNELS // HEADS * SIZE * SIZE
    assert gates.partitions(int8_path) == (1, {})


def test_answers_stay_close_to_float(files):
    path, int8_path, images = files
    expected, found = (np.stack([Engine(p).features(image[None]) for image in images]) for p in (path, int8_path))
    assert np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()  # 2 % measured: a few of 255 steps


@given(st.floats(-1e3, 1e3, width=32), st.floats(0, 1e3, width=32))
def test_a_symmetric_range_holds_what_it_held(low, span):
    ranges = {"a": {"min": np.float32([low]), "max": np.float32([low + span])}, "b": {"min": 0, "max": 1}}
    widened = with_symmetric(ranges, frozenset({"a"}))
    scale = (float(widened["a"]["max"][0]) - float(widened["a"]["min"][0])) / 255
    assert widened["a"]["min"][0] == pytest.approx(-128 * scale, rel=1e-5, abs=1e-30)
    assert widened["a"]["max"][0] >= max(abs(low), abs(low + span)) * (1 - 1e-6) - 1e-30
    assert widened["b"] is ranges["b"]


def test_one_bright_image_widens_the_range_as_far_as_it_goes(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (20, SIZE, SIZE, 3)).astype(np.float32)
    images[7, 0, 0, 0] = 9.0
    float_path = tflite.convert_float(TinyAttention().eval(), (1, SIZE, SIZE, 3), 4, tmp_path / "float.tflite")
    path = tflite.quantize_static(float_path, images, tmp_path / "int8.tflite")
    model = flatbuffer.read_model(path)
    graph = flatbuffer.subgraph_of(model, flatbuffer.FEATURES)
    first = next(op for op in graph.operators if flatbuffer.operator_name(model, op) == "QUANTIZE")
    quantization = graph.tensors[first.outputs[0]].quantization
    assert (127 - quantization.zeroPoint[0]) * quantization.scale[0] == pytest.approx(9.0, rel=0.01)
