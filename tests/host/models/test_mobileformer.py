"""Mobile-Former: the public logits, the parts against loops, what the tokens carry, the inference form, formats."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.probes import make_images, photos, randomize, relative_error
from converters import coreml, gates, tflite
from converters.mil import MilProgram
from device.engine import Engine
from host.errors import ModelError
from host.models.deploy import replace_modules
from host.models.entry import ModelEntry
from host.models.mobileformer import (
    ChannelShuffle,
    DynamicReLU,
    Former,
    FormerToMobile,
    MobileFormer,
    MobileToFormer,
    Plain,
)
from host.models.mobileformer_variants import ENTRIES, field_32, published
from tests.support.models import ranks_and_operations

# What AAboys/MobileFormer (commit f4473106, torch 2.13, float64) answers to `make_images(1, 64)` with four classes and
# the weights of `randomize`; from bench/results/mobileformer_reference.json, whose program needs that repository.
PUBLIC_LOGITS = {
    "96m": [1.455224781, 1.183099044, -0.264634901, -1.637714928],
    "52m": [-2.113866882, 0.487437466, 0.373284835, 2.220908933],
    "26m": [-0.242826507, 0.025958569, -1.660715797, 0.759324678],
}
SMALL = ("field-64", "field-32", "26m")


def make_model(entry: ModelEntry) -> MobileFormer:
    return randomize(entry.create(num_classes=5))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- the public implementation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLIC_LOGITS)
def test_logits_are_the_public_implementation_s(variant):
    model = randomize(published(variant, num_classes=4, in_chans=3, image_size=64).double())
    with torch.no_grad():
        logits = model(make_images(1, 64).double())[0]
    torch.testing.assert_close(logits, torch.tensor(PUBLIC_LOGITS[variant], dtype=torch.float64), rtol=0, atol=1e-6)


# --- parts, against loops ---------------------------------------------------------------------------------------------


def attend(query: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """One query [C] on keys and values [L, C], head by head."""
    size = len(query) // num_heads
    heads = [slice(index * size, (index + 1) * size) for index in range(num_heads)]
    return torch.cat([((keys[:, h] @ query[h]) / size**0.5).softmax(0) @ values[:, h] for h in heads])


def test_mobile_to_former_reads_the_map_itself_through_a_gate_and_a_norm():
    bridge, x, tokens = randomize(MobileToFormer(12, 16).double()), draw(1, 12, 5, 4), draw(1, 3, 16)
    pixels = x[0].flatten(1).T  # [H W, C]
    for token, out in zip(tokens[0], bridge(x, tokens)[0], strict=True):
        read = attend(bridge.query(token), pixels, pixels, num_heads=2)
        gate = 2 * F.hardsigmoid(bridge.gate(token))
        torch.testing.assert_close(out, bridge.norm(token + bridge.proj(read * gate)))


def test_former_lets_tokens_read_each_other_unprojected():
    former, tokens = randomize(Former(16).double()), draw(1, 3, 16)
    for token, out in zip(tokens[0], former(tokens)[0], strict=True):
        read = former.norm(token + former.proj(attend(former.query(token), tokens[0], tokens[0], num_heads=4)))
        torch.testing.assert_close(out, former.ffn_norm(read + former.ffn(read)))


def test_former_to_mobile_adds_to_every_pixel_what_it_reads_from_the_tokens():
    bridge, x, tokens = randomize(FormerToMobile(12, 16).double()), draw(1, 12, 5, 4), draw(1, 3, 16)
    out, keys, values = bridge(x, tokens), bridge.key(tokens[0]), bridge.value(tokens[0])
    for row, column in np.ndindex(5, 4):
        pixel = x[0, :, row, column]
        torch.testing.assert_close(out[0, :, row, column], pixel + attend(pixel, keys, values, num_heads=2))


def test_dynamic_relu_has_two_slopes_per_channel_within_bounds():
    act, x, token = randomize(DynamicReLU(6, 16).double()), draw(2, 6, 3, 3), draw(2, 16)
    first, second = act.slopes(9 * token)
    assert (first.amin(), first.amax(), second.amin(), second.amax()) == (0, 2, -1, 1)
    first, second = act.slopes(token)
    for image, channel in np.ndindex(2, 6):
        pixels = x[image, channel]
        expected = torch.max(first[image, channel] * pixels, second[image, channel] * pixels)
        torch.testing.assert_close(act(x, token)[image, channel], expected)


def test_dynamic_relu_starts_near_a_relu():
    model = field_32(num_classes=5, in_chans=3)
    act = model.blocks[0].mobile.act1
    x = make_images(2, 4, channels=act.excite.out_features // 2)
    torch.testing.assert_close(act(x, model.tokens[:1].expand(2, -1)), x.relu(), rtol=0, atol=0.05)


def test_shuffle_deals_one_channel_of_every_group_in_turn():
    x = torch.arange(12.0).reshape(1, 12, 1, 1).expand(1, 12, 2, 2)
    shuffled = ChannelShuffle(4)(x)
    assert shuffled[0, :, 1, 1].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert torch.equal(ChannelShuffle(3)(shuffled), x)
    assert max(ranks_and_operations(ChannelShuffle(4), x)[0]) == 4


@pytest.mark.parametrize(("channels", "stride", "has_skip"), [(8, 1, True), (12, 1, False), (8, 2, False)])
def test_first_block_skips_where_shapes_allow(channels, stride, has_skip):
    block, x = randomize(Plain(8, 2, channels, stride, groups=1)), make_images(1, 6, channels=8)
    branch = nn.Sequential(*block)(x)
    assert torch.equal(block(x), x + branch if has_skip else branch)


# --- what the tokens carry: claim 4 of the specification --------------------------------------------------------------


class CutBridge(nn.Module):
    """In the place of Mobile -> Former: the tokens as they were."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens


def slopes_and_tokens(model: MobileFormer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All slopes [B, ...], token 0 after every block [B, ...] and the logits [B, K]."""
    slopes, tokens = [], []
    for module in model.modules():
        if isinstance(module, DynamicReLU):
            module.register_forward_pre_hook(lambda act, inputs: slopes.extend(act.slopes(inputs[1])))
        if isinstance(module, Former):
            module.register_forward_hook(lambda former, inputs, output: tokens.append(output[:, 0]))
    with torch.no_grad():
        logits = model(images)
    return torch.cat(slopes, dim=1), torch.cat(tokens, dim=1), logits


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.variant in SMALL], ids=lambda entry: entry.variant)
def test_slopes_depend_on_the_image_through_the_bridges_alone(entry: ModelEntry):
    images = make_images(3, entry.image_size)
    slopes, tokens, _ = slopes_and_tokens(make_model(entry), images)
    assert relative_error(slopes[:1], slopes[1:2]) > 0.01
    assert relative_error(tokens[:1], tokens[1:2]) > 0.01
    cut = make_model(entry)
    replace_modules(cut, MobileToFormer, lambda bridge: CutBridge())
    slopes, tokens, logits = slopes_and_tokens(cut, images)
    assert relative_error(slopes, slopes[:1]) < 1e-5  # only the rounding of one batch row against another
    assert relative_error(tokens, tokens[:1]) < 1e-5
    assert relative_error(logits[:1], logits[1:2]) > 1e-3  # Mobile itself still sees the image


def test_every_bridge_alone_makes_the_slopes_behind_it_depend_on_the_image():
    entry, images = ENTRIES[-1], make_images(2, 32)
    for kept in range(4):
        model = make_model(entry)
        for index, block in enumerate(model.blocks):
            if index != kept:
                block.to_former = CutBridge()
        tokens = slopes_and_tokens(model, images)[1].reshape(2, 4, -1)  # [B, blocks, D]
        differs = (tokens[0] - tokens[1]).abs().amax(dim=1) > 1e-4
        assert differs.tolist() == [index >= kept for index in range(4)]


# --- protocol ---------------------------------------------------------------------------------------------------------


def test_inference_form_has_no_norm_with_statistics():
    deployed = make_model(ENTRIES[-1]).deploy()
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in deployed.modules())


def test_sixteen_steps_learn_32_images():
    torch.manual_seed(0)
    model, images, labels = field_32(num_classes=4, in_chans=3), make_images(32, 32), torch.arange(32) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(16):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 7}, "image_size must be at least 8, the stride of the last map, got 7"),
        ({"embed_dim": 30}, "embed_dim must be a multiple of 4, the heads of the Former, got 30"),
        ({"num_tokens": 0}, "num_tokens and groups must be 1 or more, got 0 and 1"),
        ({"groups": 0}, "num_tokens and groups must be 1 or more, got 3 and 0"),
        ({"rows": ((2, 16, 1),)}, "rows must be 2 or more, the first without tokens, got 1"),
        ({"rows": ((2, 16, 1), (0, 32, 2))}, r"expansions must be 1 or more, got 0 in the row \(0, 32, 2\)"),
        ({"rows": ((2, 16, 1), (6, 32, 4))}, r"strides must be 1 or 2, got 4 in the row \(6, 32, 4\)"),
        ({"rows": ((2, 16, 1), (6, 33, 2))}, "channels must be multiples of 2 with groups=1, got 33"),
        ({"groups": 4, "rows": ((2, 16, 1), (6, 18, 2))}, "channels must be multiples of 4 with groups=4, got 18"),
        ({"groups": 4, "stem_channels": 9}, "groups must divide the first block's 18 channels, got 4"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ModelError, match=message):
        field_32(num_classes=5, in_chans=3, **sizes)


# --- formats: groups and shuffles; the tests of all families convert the others ---------------------------------------


@pytest.fixture(scope="module")
def grouped() -> tuple[MobileFormer, np.ndarray, Tensor]:
    """A small model with the groups of 26M, photos [N, H, W, C] and its logits [N, K]."""
    rows = ((2, 16, 1), (6, 16, 2), (3, 16, 1))
    model, frames = randomize(field_32(num_classes=10, in_chans=3, rows=rows, groups=4)), photos(32, count=4)
    with torch.no_grad():
        return model, frames, model(torch.from_numpy(frames).permute(0, 3, 1, 2))


@pytest.mark.slow
def test_tflite_follows_the_grouped_model_in_one_partition(grouped, tmp_path: Path):
    model, frames, logits = grouped
    deployed, path = model.deploy(), tmp_path / "model.tflite"
    tflite.convert_float(deployed, (1, 32, 32, 3), 10, path)
    gates.assert_builtin_ops(path)
    assert gates.partitions(path)[0] == 1
    engine = Engine(path)
    features = torch.from_numpy(np.stack([engine.features(frame[None]) for frame in frames])).reshape(len(frames), -1)
    assert relative_error(deployed.head(features), logits) < 1e-5


@pytest.mark.slow
def test_core_ml_follows_the_grouped_model(grouped, tmp_path: Path):
    model, frames, logits = grouped
    path = tmp_path / "model.mlpackage"
    coreml.convert(model.deploy(), (1, 32, 32, 3), path, input_spec_metadata={}, labels=[])
    program = MilProgram(path, round_to_half=True)
    outputs = np.concatenate([program.run({"images": frame[None]})["logits"] for frame in frames])
    assert F.cosine_similarity(torch.from_numpy(outputs), logits).min() > 0.9999
