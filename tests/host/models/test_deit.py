"""DeiT: the published counts, widths as pruning leaves them, both heads as one, the inference form."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.probes import make_images, photos, randomize, relative_error
from converters import coreml, gates, tflite
from converters.mil import MilProgram
from device.engine import Engine
from host.errors import ModelError
from host.models.deit import (
    ENTRIES,
    VisionTransformer,
    field_32,
    field_64,
    revit,
)
from host.models.measure import count_macs, count_parameters
from host.models.vit_widths import BlockWidths, revit_widths, uniform_widths

PUBLISHED = [entry for entry in ENTRIES if entry.is_exact]
IRREGULAR = (
    BlockWidths(num_heads=3, qk_dim=8, v_dim=16, mlp_dim=48),
    BlockWidths(num_heads=1, qk_dim=24, v_dim=8, mlp_dim=96),
    BlockWidths(num_heads=2, qk_dim=16, v_dim=40, mlp_dim=64),
)


def make_model(**changes) -> VisionTransformer:
    options = {"num_classes": 5, "in_chans": 3, "image_size": 32, "patch_size": 8, "embed_dim": 64}
    return VisionTransformer(**{**options, "widths": IRREGULAR, "is_distilled": True, **changes})


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "macs"), [("small", 4.6e9), ("base", 17.6e9)])
def test_macs_agree_with_the_published_ones(variant, macs):
    entries = [entry for entry in PUBLISHED if entry.variant.startswith(variant)]
    assert [entry.macs for entry in entries] == pytest.approx([macs, macs], rel=0.01)


# --- features and heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_distilled", [False, True])
def test_logits_are_the_head_of_the_features(is_distilled):
    model = randomize(make_model(is_distilled=is_distilled))
    images = make_images(2, 32)
    features = model.forward_features(images)
    assert features.shape == (2, model.feature_dim) == (2, 128 if is_distilled else 64)
    assert model.head.out_features == 5
    torch.testing.assert_close(model.head(features), model(images), rtol=0, atol=0)


def test_mean_of_the_two_heads_is_one_linear_head_on_both_tokens():
    head = randomize(make_model()).double().head
    features = torch.randn(3, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    classes, teacher = head.separate(features)
    torch.testing.assert_close(classes, head.classes(features[:, :64]))
    torch.testing.assert_close(teacher, head.teacher(features[:, 64:]))
    torch.testing.assert_close(head.merged()(features), (classes + teacher) / 2)
    assert (head(features) == (classes + teacher) / 2).all()


@pytest.mark.parametrize("build", [field_32, field_64])
def test_field_models_can_be_distilled(build):
    model = build(num_classes=10, in_chans=1, is_distilled=True)
    model(make_images(2, model.image_size, 1)).square().sum().backward()
    assert model.feature_dim == 256
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_stochastic_depth_rises_to_its_maximum_and_acts_in_training_only():
    model = randomize(make_model(drop_path=0.5))
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([0, 0.25, 0.5])
    images = make_images(4, 32)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))


# --- widths as pruning leaves them ------------------------------------------------------------------------------------

WIDE = uniform_widths(2, 4, 16, 64)
KEPT = (  # heads, then indices within each head of queries and keys, of values, then of the MLP
    ([0, 2, 3], [1, 4, 5, 9], [0, 2, 3, 7, 11, 15], range(8, 40)),
    ([1], range(16), [3, 8], [0, 63]),
)


def surviving(heads, qk, v) -> tuple[Tensor, Tensor]:
    """Rows of `qkv` and columns of `proj` that remain in a block of 4 heads of 16."""
    rows = torch.arange(3 * 4 * 16).view(3, 4, 16)[:, heads]
    qkv = torch.cat([rows[0][:, qk].flatten(), rows[1][:, qk].flatten(), rows[2][:, v].flatten()])
    return qkv, rows[2][:, v].flatten() - 2 * 4 * 16


def parts_of(block: nn.Module, kept) -> list[tuple[Tensor, int, Tensor]]:
    """Every tensor of a wide block that pruning touches, the axis, and what remains of it."""
    heads, qk, v, mlp = kept
    rows, columns = surviving(heads, qk, v)
    attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
    hidden = torch.tensor(list(mlp))
    return [
        *((attn.qkv.weight, 0, rows), (attn.qkv.bias, 0, rows), (attn.proj.weight, 1, columns)),
        *((fc1.weight, 0, hidden), (fc1.bias, 0, hidden), (fc2.weight, 1, hidden)),
    ]


def touched(block: nn.Module) -> list[Tensor]:
    attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
    return [attn.qkv.weight, attn.qkv.bias, attn.proj.weight, fc1.weight, fc1.bias, fc2.weight]


@torch.no_grad()
def prune(wide: VisionTransformer, **changes) -> VisionTransformer:
    """A narrow copy with the surviving rows and columns; what is copied from is set to zero in `wide` elsewhere."""
    widths = [
        BlockWidths(num_heads=len(heads), qk_dim=len(qk), v_dim=len(v), mlp_dim=len(mlp)) for heads, qk, v, mlp in KEPT
    ]
    narrow = make_model(widths=widths, **changes).to(torch.float64).eval()
    own = narrow.state_dict()
    fitting = {name: tensor for name, tensor in wide.state_dict().items() if tensor.shape == own[name].shape}
    narrow.load_state_dict(own | fitting)
    for wide_block, narrow_block, kept in zip(wide.blocks, narrow.blocks, KEPT, strict=True):
        for (tensor, axis, indices), target in zip(parts_of(wide_block, kept), touched(narrow_block), strict=True):
            target.copy_(tensor.index_select(axis, indices))
            tensor.index_fill_(axis, torch.tensor(sorted({*range(tensor.shape[axis])} - {*indices.tolist()})), 0)
    return narrow


def test_model_with_zeroed_structures_equals_the_narrow_one_with_what_survives():
    wide = randomize(make_model(widths=WIDE)).double()
    images = make_images(4, 32).double()
    with torch.no_grad():
        before = wide(images)
        narrow = prune(wide)
        assert relative_error(narrow(images), wide(images)) < 1e-12
        assert relative_error(wide(images), before) > 0.01


def test_softmax_scale_stays_that_of_the_head_before_pruning():
    wide = randomize(make_model(widths=WIDE, softmax_scale=16**-0.5)).double()
    images = make_images(4, 32).double()
    with torch.no_grad():
        kept = prune(copy.deepcopy(wide), softmax_scale=wide.softmax_scale)
        other = prune(wide)
        assert relative_error(kept(images), wide(images)) < 1e-12
        assert relative_error(other(images), wide(images)) > 1e-3


# --- ReViT ------------------------------------------------------------------------------------------------------------


def lists_of(widths: tuple[BlockWidths, ...]) -> tuple[list[int], ...]:
    return tuple([getattr(block, name) for block in widths] for name in ("num_heads", "qk_dim", "v_dim", "mlp_dim"))


@pytest.mark.parametrize(
    ("embed_dim", "rule", "ends", "outer", "middle"),
    [
        (384, "repository", (10, 32), (4, 16), (8, 32)),
        (176, "repository", (10, 16), (2, 8), (4, 16)),
        (384, "paper", (4, 16), (4, 16), (8, 40)),
        (176, "paper", (2, 8), (2, 8), (4, 16)),
    ],
)
def test_revit_is_wide_in_the_middle(embed_dim, rule, ends, outer, middle):
    heads, qk, v, mlp = lists_of(revit_widths(embed_dim, rule=rule))
    expected = [ends, outer, outer, *[middle] * 6, outer, outer, ends]
    assert list(zip(heads, qk, strict=True)) == expected
    assert v == [64] * 12
    assert mlp == [3 * embed_dim] * 3 + [6 * embed_dim] * 6 + [3 * embed_dim] * 3


@pytest.mark.parametrize(
    ("embed_dim", "rule", "parameters", "macs"),
    [
        (384, "repository", 23_123_280, 4_705_190_400),  # 23.1 M in the specification; 23 M and 4.7 G printed
        (176, "repository", 5_339_136, 1_135_290_112),  # 5.34 M in the specification; 5.9 M and 1.3 G printed
        (384, "paper", 22_434_128, 4_533_814_272),
        (176, "paper", 4_875_712, 992_413_312),
    ],
)
def test_revit_has_exactly_this_size(embed_dim, rule, parameters, macs):
    """Distilled, with 1000 classes: the count in the specification is that of this form."""
    with torch.device("meta"):
        model = revit(embed_dim=embed_dim, rule=rule, num_classes=1000, in_chans=3)
    assert (count_parameters(model), count_macs(model, 224, 3)) == (parameters, macs)
    assert model.softmax_scale == 64**-0.5


# --- the inference form -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("is_distilled", [False, True])
@pytest.mark.parametrize("widths", [IRREGULAR, IRREGULAR[:1]], ids=["3-blocks", "1-block"])
def test_deployed_outputs_equal_the_originals(widths, is_distilled):
    model = randomize(make_model(widths=widths, is_distilled=is_distilled))
    before = copy.deepcopy(model.state_dict())
    images = make_images(3, 32)
    random_state = torch.get_rng_state()
    deployed = model.train().deploy()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not deployed.training
    model.eval()
    assert relative_error(deployed.forward_features(images), model.forward_features(images)) < 1e-5
    assert relative_error(deployed(images), model(images)) < 1e-5
    assert relative_error(deployed.deploy()(images), model(images)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(deployed.head) is nn.Linear


def test_inference_form_computes_less():
    model = make_model()
    assert count_macs(model.deploy(), 32, 3) < 0.85 * count_macs(
        model, 32, 3
    )  # the last of 3 blocks asks for two tokens


def test_blocks_of_irregular_widths_run_as_one_partition(tmp_path: Path):
    model = randomize(make_model(widths=IRREGULAR[:2]))  # the second block has a single head
    images, path = photos(32), tmp_path / "model.tflite"
    deployed = model.deploy()
    tflite.convert_float(deployed, (1, 32, 32, 3), 5, path)
    gates.assert_builtin_ops(path)
    assert gates.partitions(path) == (1, {})
    engine = Engine(path)
    features = np.stack([engine.features(image[None]) for image in images])
    expected = model.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).detach()
    assert relative_error(torch.from_numpy(features), expected) < 1e-5


@pytest.mark.slow
def test_blocks_of_irregular_widths_follow_in_coreml(tmp_path: Path):
    model = randomize(make_model())
    path = tmp_path / "model.mlpackage"
    coreml.convert(model.deploy(), (1, 32, 32, 3), path, input_spec_metadata={}, labels=list("abcde"))
    program, images = MilProgram(path, round_to_half=True), photos(32, count=4)
    logits = torch.from_numpy(np.concatenate([program.run({"images": image[None]})["logits"] for image in images]))
    expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).detach()
    assert torch.cosine_similarity(logits, expected).min() >= 0.9999


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "positive multiple of 8, the patch_size, got 30; take 24 or 32"),
        ({"patch_size": 0}, "patch_size must be 1 or more, got 0; take one that divides image_size"),
        ({"embed_dim": 0}, "must be 1 or more, got 0 and 3"),
        ({"widths": ()}, "the number of blocks must be 1 or more, got 64 and 0"),
        ({"softmax_scale": 0.0}, r"softmax_scale must be positive, got 0\.0"),
        ({"drop_path": 1.0}, r"below 1, got 1\.0"),
    ],
)
def test_impossible_layouts_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        make_model(**change)


@pytest.mark.parametrize("name", ["num_heads", "qk_dim", "v_dim", "mlp_dim"])
def test_widths_below_one_are_refused(name):
    with pytest.raises(ModelError, match=f"{name} of a block must be 1 or more, got 0"):
        BlockWidths(**{"num_heads": 1, "qk_dim": 1, "v_dim": 1, "mlp_dim": 1, name: 0})


def test_impossible_revits_are_refused():
    with pytest.raises(ModelError, match="rule must be paper or repository, got table-6"):
        revit_widths(384, rule="table-6")
    with pytest.raises(ModelError, match="num_heads of a block must be 1 or more, got 0"):
        revit_widths(64)
