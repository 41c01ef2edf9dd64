"""NiNformer: the specification's integers, the gate's formula, what mixes tokens and what does not."""

import math

import pytest
import torch
from torch import nn

from bench.probes import make_images, randomize
from bench.small_classifiers import CLASSIFIERS, neighbour_mask, no_token_ff_gate
from host.errors import ModelError
from host.models.measure import count_parameters
from host.models.ninformer import Block, GatingUnit, NiNformer, mixer_gate

TINY = {"num_classes": 3, "in_chans": 2, "image_size": 12, "embed_dim": 8, "hidden_dim": 6, "depth": 2}  # 9 tokens


@pytest.mark.parametrize(("shared_norm", "parameters"), [(True, 659_264), (False, 659_264 + 512)])
def test_a_block_is_made_of_the_specified_parts(shared_norm, parameters):
    sizes = {"embed_dim": 256, "hidden_dim": 512, "dropout": 0.5}
    block = Block(mixer_gate(num_tokens=64, **sizes), shared_norm=shared_norm, **sizes)
    assert count_parameters(block) == parameters
    mixer = block.unit.gate
    parts = (block.norm, mixer.token_norm, mixer.token_ff, mixer.channel_norm, mixer.channel_ff, block.unit.proj)
    assert [count_parameters(part) for part in (*parts, block.ff)] == [512, 512, 66_112, 512, 262_912, 65_792, 262_912]


@pytest.mark.parametrize("shared_norm", [True, False])
def test_four_blocks_with_separate_norms_have_512_more_each(shared_norm):
    with torch.device("meta"):
        model = NiNformer(num_classes=10, in_chans=3, shared_norm=shared_norm)
    assert count_parameters(model) == 2_652_170 + (0 if shared_norm else 4 * 512)


def norm(x: list[float], layer: nn.LayerNorm) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [(x[d] - mean) / math.sqrt(variance + layer.eps) * weight[d] + bias[d] for d in range(len(x))]


def linear(x: list[float], layer: nn.Linear) -> list[float]:
    pairs = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in pairs]


def feed_forward(x: list[float], layers: nn.Sequential) -> list[float]:
    hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in linear(x, layers[0])]
    return linear(hidden, layers[3])


def add(x: list[float], y: list[float]) -> list[float]:
    return [a + b for a, b in zip(x, y, strict=True)]


def columns(tokens: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*tokens, strict=True)]


def block_by_loops(tokens: list[list[float]], block: Block, ff_norm: nn.LayerNorm) -> list[list[float]]:
    """The specification's equations, one token and one channel at a time."""
    mixer = block.unit.gate
    x = [norm(token, block.norm) for token in tokens]
    normed = columns([norm(token, mixer.token_norm) for token in x])
    mixed = columns([feed_forward(channel, mixer.token_ff) for channel in normed])
    u = [add(token, change) for token, change in zip(x, mixed, strict=True)]
    gates = [add(token, feed_forward(norm(token, mixer.channel_norm), mixer.channel_ff)) for token in u]
    products = [[a * b for a, b in zip(linear(x[n], block.unit.proj), gates[n], strict=True)] for n in range(len(x))]
    y = [add(token, product) for token, product in zip(tokens, products, strict=True)]
    return [add(token, feed_forward(norm(token, ff_norm), block.ff)) for token in y]


@pytest.mark.parametrize("shared_norm", [True, False])
def test_a_block_computes_the_equations(shared_norm):
    sizes = {"embed_dim": 5, "hidden_dim": 7, "dropout": 0.5}
    block = Block(mixer_gate(num_tokens=4, **sizes), shared_norm=shared_norm, **sizes)
    block = randomize(block).double()
    tokens = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = block_by_loops(tokens.tolist(), block, block.norm if shared_norm else block.ff_norm)
    torch.testing.assert_close(block(tokens[None])[0], torch.tensor(expected, dtype=torch.float64))


def test_the_shared_norm_learns_from_both_places():
    model = NiNformer(**TINY)
    names = [name for name, _ in model.blocks[0].named_parameters() if name.startswith(("norm.", "ff_norm."))]
    assert names == ["norm.weight", "norm.bias"]
    with torch.no_grad():
        model.blocks[0].norm.weight.zero_()
        model.blocks[0].norm.bias.zero_()
    block, x = model.blocks[0].eval(), torch.randn(1, 9, 8)
    expected = block.ff(torch.zeros(8)) + block.unit(torch.zeros(1, 9, 8))
    torch.testing.assert_close(block(x) - x, expected, rtol=1e-5, atol=1e-6)


def test_features_are_the_mean_of_the_tokens_of_row_by_row_patches():
    model = randomize(NiNformer(**TINY))
    images = make_images(2, 12, channels=2)
    patch = images[:, :, 4:8, 8:12].flatten(1)  # row 1, column 2: token 5
    token = patch @ model.patch_embed.weight.flatten(1).T + model.patch_embed.bias
    torch.testing.assert_close(model.embed(images)[:, 5], token)
    features = model.blocks(model.embed(images)).mean(dim=1)
    torch.testing.assert_close(model.forward_features(images), features)
    torch.testing.assert_close(model(images), model.head(features))


@pytest.mark.parametrize(("options", "mixes"), [({}, True), ({"make_gate": no_token_ff_gate}, False)])
def test_tokens_meet_in_the_token_ff_alone(options, mixes):
    model = randomize(NiNformer(**TINY, **options))
    images = make_images(2, 12, channels=2)
    changed = images.clone()
    changed[:, :, 8:, 8:] += 1  # the last token's pixels
    before, after = (model.blocks(model.embed(x))[:, 0] for x in (images, changed))
    assert torch.equal(before, after) != mixes


def test_permuted_tokens_change_the_output():
    model = randomize(NiNformer(**TINY))
    tokens = model.embed(make_images(2, 12, channels=2))
    permuted = model.blocks(tokens.flip(1)).mean(dim=1)
    assert (permuted - model.blocks(tokens).mean(dim=1)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        (30, 4, "positive multiple of 4, the patch_size, got 30; take 28 or 32"),
        (2, 4, "got 2; take 4$"),
        (0, 4, "got 0; take 4$"),
        (32, 0, "patch_size must be 1 or more, got 0"),
    ],
)
def test_sizes_that_cannot_be_cut_into_patches_are_refused(image_size, patch_size, message):
    with pytest.raises(ModelError, match=message):
        NiNformer(num_classes=3, in_chans=1, image_size=image_size, patch_size=patch_size)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_of_the_bench_follow_the_model_protocol(name):
    model = CLASSIFIERS[name](image_size=8, num_classes=3, in_chans=1, dropout=0.5)
    images = torch.randn(2, 1, 8, 8)
    assert model.forward_features(images).shape == (2, model.feature_dim)
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    deployed = model.deploy()
    torch.testing.assert_close(deployed(images), model.eval()(images))


def test_rivals_of_equal_size_are_within_one_percent_of_ninformer():
    with torch.device("meta"):
        sizes = {"image_size": 32, "num_classes": 10, "in_chans": 3, "dropout": 0.5}
        parameters = {name: count_parameters(build(**sizes)) for name, build in CLASSIFIERS.items()}
    for rival in ("ViT", "Local-ViT", "MLP-Mixer, 8 blocks"):
        assert parameters[rival] == pytest.approx(parameters["NiNformer"], rel=0.01)


def test_ablated_gates_add_or_ignore_their_input():
    x = torch.randn(1, 4, 256)
    sizes = {"image_size": 8, "num_classes": 3, "in_chans": 1, "dropout": 0.5}
    unit = CLASSIFIERS["NiNformer, sum instead of product"](**sizes).eval().blocks[0].unit
    torch.testing.assert_close(unit(x), unit.proj(x) + unit.gate(x))
    unit = CLASSIFIERS["NiNformer, learned table as gate"](**sizes).eval().blocks[0].unit
    assert type(unit) is GatingUnit
    assert torch.equal(unit.gate(x), unit.gate(-x))


def test_local_attention_sees_the_3_by_3_tokens_around():
    mask = neighbour_mask(4)
    assert mask[5].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert torch.equal(mask, mask.T)
