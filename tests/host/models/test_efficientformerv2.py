"""EfficientFormerV2: the published counts, parity with timm, the inference form of its attention, our small variant."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from host.models.measure import count_macs, count_parameters
from tests.support.models import make_images, operations, photos, randomize, ranks, relative_error

BY_VARIANT = {entry.variant: entry for entry in ENTRIES}
PUBLISHED = {  # parameters with both heads, MACs
    "s0": (3_600_256, 0.396e9),
    "s1": (6_185_560, 0.652e9),
    "s2": (12_710_112, 1.247e9),
    "l": (26_322_288, 2.553e9),
}


def on_meta(entry: ModelEntry, **options: object) -> nn.Module:
    with torch.device("meta"):
        return entry.create(**options).eval()


def settle(model: nn.Module, images_nchw: Tensor) -> nn.Module:
    """Random weights, and batch norms with the statistics of these images.

    Random statistics would let maps grow from block to block: to 1e8 in S0, far beyond float16.
    """
    randomize(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain average
    with torch.no_grad():
        model.train()
        model(images_nchw)
    model.eval()
    return model


def min_cosine(outputs: np.ndarray, reference: np.ndarray) -> float:
    return float(F.cosine_similarity(torch.from_numpy(outputs), torch.from_numpy(reference)).min())


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_variants_have_exactly_the_measured_sizes(variant):
    entry, (parameters, macs) = BY_VARIANT[variant], PUBLISHED[variant]
    model = on_meta(entry)
    assert count_parameters(model) == entry.parameters == parameters
    assert count_macs(model, 224, 3) == entry.macs == pytest.approx(macs, rel=0.01)
    assert count_parameters(on_meta(entry, distilled=False)) == parameters - 1000 * (model.feature_dim + 1)


def test_field_64_has_exactly_the_listed_size():
    entry = BY_VARIANT["field-64"]
    model = on_meta(entry)
    assert (count_parameters(model), count_macs(model, 64, 3)) == (entry.parameters, entry.macs)
    assert [tuple(stage.blocks[-1].token_mixer.resolution) for stage in model.backbone.stages[2:]] == [(4, 4), (4, 4)]


# --- parity with timm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["s0", *(pytest.param(v, marks=pytest.mark.slow) for v in ("s1", "s2", "l"))])
def test_logits_are_timms(variant):
    import timm

    entry, images = BY_VARIANT[variant], make_images(2, 224)
    reference = settle(timm.create_model(entry.timm_name, num_classes=10), images)
    ours = entry.create(num_classes=10).eval()
    ours.load_state_dict(entry.from_timm(reference.state_dict()))
    with torch.no_grad():
        single, theirs = ours(images), reference(images)
        expected = reference.double()(images.double())
        assert relative_error(ours.double()(images.double()), expected) <= 1e-10
        assert relative_error(single, expected) <= 2 * relative_error(theirs, expected)
        assert relative_error(ours.deploy()(images.double()), expected) <= 1e-10


def test_stochastic_depth_is_the_published_one():
    rates = {variant: _last_rate(on_meta(BY_VARIANT[variant])) for variant in PUBLISHED}
    assert rates == {"s0": 0.0, "s1": 0.0, "s2": pytest.approx(0.02), "l": pytest.approx(0.1)}
    with torch.device("meta"):
        assert _last_rate(s2(num_classes=10, in_chans=3, drop_path=0.0)) == 0.0


def _last_rate(model: nn.Module) -> float:
    return getattr(model.backbone.stages[-1].blocks[-1].drop_path2, "drop_prob", 0.0)


# --- the inference form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [field_64, s0], ids=lambda build: build.__name__)
def test_inference_form_has_the_same_outputs(build):
    model = build(num_classes=10, in_chans=3)
    images = make_images(4, model.image_size)
    settle(model, images)
    before = copy.deepcopy(model.state_dict())
    deployed = model.deploy()
    with torch.no_grad():
        assert relative_error(deployed.forward_features(images), model.forward_features(images)) < 1e-4
        assert relative_error(deployed(images), model(images)) < 1e-4
        assert torch.equal(deployed.deploy()(images), deployed(images))
    assert isinstance(deployed.head, nn.Linear)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_the_norm_after_the_last_sum_remains():
    deployed = randomize(field_64(num_classes=10, in_chans=3)).deploy()
    assert [name for name, m in deployed.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["backbone.norm"]
    assert not [name for name, _ in deployed.named_parameters() if "gamma" in name or "attention_biases" in name]


def test_graph_stays_at_rank_4_and_gathers_nothing():
    deployed = randomize(field_64(num_classes=10, in_chans=3)).deploy()
    images = make_images(1, 64)
    assert max(ranks(deployed, images)) <= 4
    used = operations(deployed, images)
    assert not {name for name in used if "index" in name or "gather" in name or "avg_pool" in name}


@pytest.mark.parametrize("size", [7, 8])
def test_joined_queries_equal_convolution_plus_subsampling(size):
    query = randomize(LocalGlobalQuery(8, 16)).requires_grad_(False)
    maps = make_images(2, size, channels=8)
    expected = query(maps)
    assert relative_error(join_queries(query)(maps), expected) < 1e-5


class AttentionProbe(nn.Module):
    """Strided attention and the attention between the last stages, alone."""

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
        fold_batch_norms(model, torch.zeros(1, 8, 8, 8))
        return model


def test_attention_in_both_formats_keeps_softmax_whole(tmp_path: Path):
    maps = make_images(4, 8, channels=8)
    probe = settle(AttentionProbe(), maps).requires_grad_(False)
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


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["field-64", "s0"])
def test_both_formats_follow_the_model(variant, tmp_path: Path):
    entry = BY_VARIANT[variant]
    images, shape = photos(entry.image_size), (1, entry.image_size, entry.image_size, 3)
    maps = torch.from_numpy(images).permute(0, 3, 1, 2)
    model = settle(entry.create(), maps)  # ten logits of S0 lose 1.1e-4 to float16 weights alone, in timm's form too
    deployed = model.deploy()
    with torch.no_grad():
        expected = model(maps).numpy()
    path = tflite.convert_float(deployed, shape, entry.num_classes, tmp_path / "model.tflite")
    gates.assert_builtin_ops(path)
    assert gates.partitions(path) == (1, {})
    num_attentions = sum(isinstance(m, TalkingHeadsAttention | DownsampleAttention) for m in deployed.modules())
    assert flatbuffer.operators(path)["features"]["SOFTMAX"] == num_attentions
    engine = Engine(path)
    features = np.stack([engine.features(image[None]) for image in images])
    assert min_cosine(deployed.head(torch.from_numpy(features)).numpy(), expected) >= 0.9999
    labels = [str(label) for label in range(entry.num_classes)]
    package = coreml.convert(deployed, shape, tmp_path / "m.mlpackage", input_spec_metadata={}, labels=labels)
    program = MilProgram(package, round_to_half=True)
    logits = np.concatenate([program.run({"images": image[None]})["logits"] for image in images])
    assert min_cosine(logits, expected) >= 0.9999


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


def test_other_sizes_have_tables_of_their_own():
    images = make_images(2, 96)
    model = settle(s0(num_classes=10, in_chans=3, image_size=96), images).requires_grad_(False)
    assert model(images).shape == (2, 10)
    assert relative_error(model.deploy()(images), model(images)) < 1e-4


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (s0, {"image_size": 240}, "multiple of 32.*got 240"),
        (s0, {"image_size": 0}, "multiple of 32.*got 0"),
        (s0, {"drop_path": 1.0}, "at least 0 and below 1, got 1.0"),
        (field_64, {"drop_path": -0.1}, "at least 0 and below 1, got -0.1"),
    ],
)
def test_impossible_options_are_refused(build, options, message):
    with pytest.raises(ModelError, match=message):
        build(num_classes=10, in_chans=3, **options)
