"""Next-ViT: the published counts, the hybrid strategy, merged norms, the pooling along rows."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.probes import make_images, randomize, relative_error
from host.errors import ModelError
from host.models.measure import count_macs, count_parameters
from host.models.nextvit import ENTRIES, HalvingPool, NextViT, Stage, field_32, from_timm, merge_norms, small

BY_VARIANT = {entry.variant: entry for entry in ENTRIES}
PUBLISHED = {"s": (31.7e6, 5.8e9, 17.3e9), "b": (44.8e6, 8.3e9, 24.6e9), "l": (57.8e6, 10.8e9, 32.0e9)}
MACS_384 = {"s": 17_215_627_264, "b": 24_586_067_968, "l": 31_956_508_672}
HYBRID = (Stage(num_conv=1, conv_width=32), Stage(num_conv=1, conv_width=64, transformer_width=128, sr_ratio=2))
ODD = (Stage(num_conv=1, conv_width=32), Stage(num_conv=1, conv_width=64, transformer_width=128, sr_ratio=5, repeats=2))


def make_model(**changes) -> NextViT:
    options = {"num_classes": 5, "in_chans": 3, "image_size": 32, "stages": HYBRID, "drop_path": 0.0}
    return NextViT(**{**options, "stem_widths": (16,), "stem_strides": (2,), **changes})


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for stage in model.stages for block in stage.blocks]


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
def test_sizes_agree_with_the_published_ones_at_224_and_384(variant):
    entry = BY_VARIANT[variant]
    with torch.device("meta"):
        model = entry.create(image_size=384).eval()
    macs_384 = count_macs(model, 384, 3)
    assert (count_parameters(model), macs_384) == (entry.parameters, MACS_384[variant])
    assert (entry.parameters, entry.macs, macs_384) == pytest.approx(PUBLISHED[variant], rel=0.01)


def test_depth_alone_makes_the_variants():
    """Two more repetitions in stage 3 cost the same each time: latency should grow evenly from S to B to L."""
    deep, deeper, deepest = (BY_VARIANT[variant] for variant in "sbl")
    assert deeper.parameters - deep.parameters == deepest.parameters - deeper.parameters
    assert deeper.macs - deep.macs == deepest.macs - deeper.macs


# --- parity with timm -------------------------------------------------------------------------------------------------


def test_names_are_timms_but_for_the_classifier():
    import timm

    with torch.device("meta"):
        reference = timm.create_model("nextvit_small").state_dict()
        names = small(num_classes=1000, in_chans=3).state_dict().keys()
    assert from_timm(reference).keys() == names
    assert reference.keys() - names == {"head.fc.weight", "head.fc.bias"}


# --- the hybrid strategy ----------------------------------------------------------------------------------------------


def test_stage_3_repeats_its_pattern_and_ends_in_attention():
    stage = Stage(num_conv=4, conv_width=384, transformer_width=512, repeats=2)
    kinds = "".join("NT"["Transformer" in kind.__name__] for kind in stage.kinds(has_attention=True))
    assert kinds == "NNNNTNNNNT"
    assert stage.widths() == [384, 384, 384, 384, 512] * 2


def test_attention_can_be_replaced_by_convolution_of_the_same_width():
    with_attention, without = make_model(), make_model(has_attention=False)
    assert [type(block).__name__ for block in blocks_of(with_attention)][-1] == "NextTransformerBlock"
    assert {type(block).__name__ for block in blocks_of(without)} == {"NextConvBlock"}
    assert [b.out_chs for b in blocks_of(without)] == [b.out_chs for b in blocks_of(with_attention)]
    images = make_images(2, 32)
    randomize(without)
    with torch.no_grad():
        assert relative_error(without.deploy()(images), without(images)) < 1e-4


def test_convolution_can_be_replaced_by_attention():
    stages = (Stage(num_conv=1, conv_width=32), Stage(num_conv=0, transformer_width=128, sr_ratio=2, repeats=2))
    kinds = [type(block).__name__ for block in blocks_of(make_model(stages=stages))]
    assert kinds == ["NextConvBlock", "NextTransformerBlock", "NextTransformerBlock"]


def test_stochastic_depth_rises_to_its_maximum():
    model = field_32(num_classes=10, in_chans=3, drop_path=0.2)
    rates = [block.mlp_drop_path.drop_prob for block in blocks_of(model)]
    assert rates == pytest.approx(np.linspace(0, 0.2, 7))
    last = blocks_of(model)[-1]
    assert (last.mhsa_drop_path.drop_prob, last.mhca_drop_path.drop_prob) == pytest.approx((0.15, 0.05))


# --- deploy -----------------------------------------------------------------------------------------------------------


def test_inference_form_has_no_norm_and_computes_as_much():
    deployed = make_model().deploy()
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in deployed.modules())
    assert not any(module.training for module in deployed.modules())
    assert count_macs(deployed, 32, 3) == count_macs(make_model().eval(), 32, 3)


def test_head_reads_the_features():
    model = randomize(make_model())
    images = make_images(2, 32)
    for form in (model, model.deploy()):
        with torch.no_grad():
            features = form.forward_features(images)
            assert features.shape == (2, form.feature_dim) == (2, 128)
            assert torch.equal(form.head(features), form(images))


def test_norms_around_a_pooling_merge_into_the_layer_behind_them():
    generator = torch.Generator().manual_seed(0)
    first, second, layer = randomize(nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 4))).double()
    x = torch.randn(2, 8, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(second(F.avg_pool1d(first(x), 4)).transpose(1, 2))
        merged = merge_norms(layer, first, second)(F.avg_pool1d(x, 4).transpose(1, 2))
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


def test_timms_own_merge_is_exact_too():
    model = randomize(field_32(num_classes=10, in_chans=3)).double()
    merged = copy.deepcopy(model)
    for block in blocks_of(merged):
        block.reparameterize()
    images = make_images(2, 32).double()
    with torch.no_grad():
        assert relative_error(merged(images), model(images)) < 1e-10


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (6, 6), (7, 6), (5, 9)])
def test_halving_pool_averages_what_is_inside(height, width):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected = F.avg_pool2d(x, 2, stride=2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(HalvingPool()(x), expected)


def test_odd_maps_stay_exact():
    model = randomize(make_model(image_size=18, stages=ODD)).double()  # maps of 9 and 5 pixels, 25 tokens per key
    images = make_images(2, 18).double()
    with torch.no_grad():
        assert relative_error(model.deploy()(images), model(images)) < 1e-10


# --- the pooling of keys and values -----------------------------------------------------------------------------------


class SquarePool(nn.Module):
    """What `sr_ratio` suggests and the authors' code does not do: the mean over 2 x 2 tokens."""

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[2] ** 0.5)
        return F.avg_pool2d(x.unflatten(2, (side, side)), 2).flatten(2)  # [B, C, M]


def test_keys_are_averaged_along_rows_not_over_squares():
    model = randomize(make_model())
    images = make_images(2, 32)
    square = copy.deepcopy(model)
    blocks_of(square)[-1].e_mhsa.sr = SquarePool()
    with torch.no_grad():
        expected = model(images)
        assert relative_error(square(images), expected) > 1e-2
        assert relative_error(model.deploy()(images), expected) < 1e-5


def test_a_run_of_tokens_goes_on_into_the_next_row():
    model = make_model(image_size=24, stages=(HYBRID[0], Stage(num_conv=0, transformer_width=128, sr_ratio=3)))
    attention = blocks_of(randomize(model).deploy())[-1].e_mhsa  # on 6 x 6 tokens, 9 per key
    tokens = torch.arange(36.0).reshape(1, 36, 1)
    assert attention._pool(tokens).flatten().tolist() == [4.0, 13.0, 22.0, 31.0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size must be 1 or more, got 0"),
        ({"image_size": 36}, "stage 2: sr_ratio 2 averages 4 tokens into each key, .* the 9x9 tokens"),
        ({"stem_strides": (2, 1)}, "one value per convolution"),
        ({"stem_strides": (0,)}, "must be 1 or more"),
        ({"stages": ()}, "at least one Stage"),
        ({"stages": (Stage(num_conv=2, conv_width=40),)}, "stage 1: widths must be multiples of 32.* got 40"),
        ({"stages": (Stage(num_conv=0),)}, "stage 1 has no blocks"),
        ({"stages": (Stage(num_conv=1, conv_width=32, repeats=0),)}, "repeats and sr_ratio 1 or more"),
        ({"stages": (Stage(num_conv=0, transformer_width=32),)}, "leaves none to the convolution"),
        ({"mix_ratio": 1.0}, "mix_ratio must be above 0 and below 1, got 1.0"),
        ({"drop_path": 1.0}, "drop_path must be 0 or more and below 1, got 1.0"),
    ],
)
def test_impossible_layouts_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        make_model(**changes)
