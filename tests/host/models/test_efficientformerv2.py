"""EfficientFormerV2: stochastic depth, the inference form of its attention, our small variant, other sizes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.probes import make_images, randomize, relative_error, settle_norms
from converters import coreml, flatbuffer, gates, tflite
from converters.mil import MilProgram
from device.engine import Engine
from host.errors import ModelError
from host.models.deploy import fold_batch_norms, inference_copy
from host.models.efficientformerv2 import (
    ENTRIES,
    Attention2d,
    Attention2dDownsample,
    DownsampleAttention,
    EfficientFormerV2Block,
    LocalGlobalQuery,
    TalkingHeadsAttention,
    field_64,
    join_queries,
    s0,
    s2,
)
from host.models.entry import ModelEntry

BY_VARIANT = {entry.variant: entry for entry in ENTRIES}


def on_meta(entry: ModelEntry, **options: object) -> nn.Module:
    with torch.device("meta"):
        return entry.create(**options).eval()


def min_cosine(outputs: np.ndarray, reference: np.ndarray) -> float:
    return float(F.cosine_similarity(torch.from_numpy(outputs), torch.from_numpy(reference)).min())


# --- against the published ones; `test_timm` compares outputs -----------------------------------------------------------


def test_stochastic_depth_is_the_published_one():
    rates = {variant: _last_rate(on_meta(BY_VARIANT[variant])) for variant in ("s0", "s1", "s2", "l")}
    assert rates == {"s0": 0.0, "s1": 0.0, "s2": pytest.approx(0.02), "l": pytest.approx(0.1)}
    with torch.device("meta"):
        assert _last_rate(s2(num_classes=10, in_chans=3, drop_path=0.0)) == 0.0


def _last_rate(model: nn.Module) -> float:
    return getattr(model.backbone.stages[-1].blocks[-1].drop_path2, "drop_prob", 0.0)


def test_field_64_attends_to_4_by_4_positions():
    model = on_meta(BY_VARIANT["field-64"])
    assert [tuple(stage.blocks[-1].token_mixer.resolution) for stage in model.backbone.stages[2:]] == [(4, 4), (4, 4)]


# --- the inference form -----------------------------------------------------------------------------------------------


def test_only_the_norm_after_the_last_sum_remains():
    deployed = randomize(field_64(num_classes=10, in_chans=3)).deploy()
    assert [name for name, m in deployed.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["backbone.norm"]
    assert not [name for name, _ in deployed.named_parameters() if "gamma" in name or "attention_biases" in name]


@pytest.mark.parametrize("size", [7, 8])
def test_joined_queries_equal_convolution_plus_subsampling(size):
    query = randomize(LocalGlobalQuery(8, 16)).requires_grad_(False)
    maps = make_images(2, size, channels=8)
    expected = query(maps)
    assert relative_error(join_queries(query)(maps), expected) < 1e-5


class AttentionProbe(nn.Module):
    """Strided attention and the attention between the last stages, alone."""

    image_size = in_chans = 8

    def __init__(self) -> None:
        super().__init__()
        strided = Attention2d(dim=8, resolution=8, stride=2, num_heads=4, key_dim=8)
        self.blocks = nn.Sequential(strided, Attention2dDownsample(dim=8, out_dim=6, resolution=8, num_heads=4))
        self.head = nn.Linear(6 * 4 * 4, 2)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        return self.blocks(images_nchw).flatten(1)

    forward = forward_features

    def deploy(self) -> nn.Module:
        model = inference_copy(self)
        model.blocks = nn.Sequential(TalkingHeadsAttention(model.blocks[0]), DownsampleAttention(model.blocks[1]))
        fold_batch_norms(model)
        return model


@pytest.mark.slow
def test_attention_in_both_formats_keeps_softmax_whole(tmp_path: Path):
    maps = make_images(4, 8, channels=8)
    probe = settle_norms(randomize(AttentionProbe()), maps).requires_grad_(False)
    deployed, frames, expected = probe.deploy(), maps.permute(0, 2, 3, 1).contiguous().numpy(), probe(maps).numpy()
    path = tflite.convert_float(deployed, (1, 8, 8, 8), 2, tmp_path / "attention.tflite")
    gates.assert_builtin_ops(path)
    used = flatbuffer.operators(path)["features"]
    assert used["SOFTMAX"] == 2
    assert not {"EXP", "DIV", "GATHER", "AVERAGE_POOL_2D"} & used.keys()
    assert used["RESIZE_BILINEAR"] == 1
    assert gates.partitions(path) == (1, {})
    engine = Engine(path)
    outputs = np.stack([engine.features(frame[None]) for frame in frames])
    np.testing.assert_allclose(outputs, expected, atol=1e-4)
    package = coreml.convert(
        deployed, (1, 8, 8, 8), tmp_path / "a.mlpackage", input_spec_metadata={}, labels=["a", "b"]
    )
    program = MilProgram(package, round_to_half=True)
    halves = np.concatenate([program.run({"images": frame[None]})["features"] for frame in frames])
    assert min_cosine(halves, expected) >= 0.9999


# --- what else must hold ----------------------------------------------------------------------------------------------


def test_an_untrained_block_is_nearly_the_identity():
    model = s0(num_classes=10, in_chans=3).eval()
    with torch.no_grad():
        for stage, size in zip(model.backbone.stages, (56, 28, 14, 7), strict=True):
            for block in stage.blocks:
                assert isinstance(block, EfficientFormerV2Block)
                x = make_images(1, size, channels=len(block.ls2.gamma))
                assert relative_error(block(x), x) < 1e-3


def test_model_in_evaluation_mode_can_be_copied_exported_and_differentiated_after_inference():
    model = field_64(num_classes=8, in_chans=1).eval()
    images = make_images(2, 64, channels=1)
    with torch.inference_mode():
        model(images)
    torch.export.export(model, (images,))
    copy.deepcopy(model)(images).sum().backward()
    assert model.train().eval() is model


@pytest.mark.parametrize(("build", "size"), [(s0, 96), (field_64, 48)])
def test_other_sizes_have_tables_of_their_own(build, size):
    images = make_images(2, size)
    model = settle_norms(randomize(build(num_classes=10, in_chans=3, image_size=size)), images).requires_grad_(False)
    assert model(images).shape == (2, 10)
    assert relative_error(model.deploy()(images), model(images)) < 1e-4


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (s0, {"image_size": 240}, "positive multiple of 32, .*, got 240; take 224 or 256"),
        (s0, {"image_size": 0}, "positive multiple of 32, .*, got 0; take 32"),
        (field_64, {"image_size": 40}, "positive multiple of 16, .*, got 40; take 32 or 48"),
        (s0, {"drop_path": 1.0}, "0 or more and below 1, got 1.0"),
        (field_64, {"drop_path": -0.1}, "0 or more and below 1, got -0.1"),
    ],
)
def test_impossible_options_are_refused(build, options, message):
    with pytest.raises(ModelError, match=message):
        build(num_classes=10, in_chans=3, **options)
