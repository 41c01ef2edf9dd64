"""MobileViT and MobileViTv2: counts, unfolding, separable attention, the inference form, unnormalized images."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.probes import make_images, randomize, relative_error
from host.errors import ModelError
from host.models.entry import ModelEntry
from host.models.measure import count_macs
from host.models.mobilevit import ENTRIES, Attention, SeparableAttention, fold, unfold

BY_NAME = {entry.name: entry for entry in ENTRIES}
FIELD = [entry for entry in ENTRIES if not entry.is_exact]
FIELD_64 = [BY_NAME["mobilevit/field-64"], BY_NAME["mobilevitv2/field-64"]]


def named(entry: ModelEntry) -> str:
    return entry.name


# --- counts -----------------------------------------------------------------------------------------------------------


def test_v2_makes_keys_only_for_the_context():
    entry = BY_NAME["mobilevitv2/050"]
    with torch.device("meta"):
        deployed = entry.create().eval().deploy()
    assert count_macs(deployed, 256, 3) == pytest.approx(0.956 * entry.macs, rel=0.001)


@pytest.mark.parametrize("entry", FIELD, ids=named)
def test_transformers_of_field_variants_see_even_maps_of_several_patches(entry):
    model, sizes = entry.create().eval(), []
    for stage in model.backbone.stages[2:]:
        stage[1].register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    model(make_images(1, entry.image_size))
    assert sizes == [(16, 16), (8, 8), (4, 4)]


# --- unfolding and attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 5, 4, 6), (3, 8, 16, 2)])
def test_unfold_and_fold_are_inverse_to_the_bit(shape):
    maps = torch.randn(shape)
    sequences = unfold(maps)
    assert torch.equal(fold(sequences, *shape[2:]), maps)
    assert torch.equal(unfold(fold(sequences, *shape[2:])), sequences)


def test_a_sequence_holds_one_place_of_every_patch():
    maps = torch.randn(2, 5, 4, 6)
    sequences = unfold(maps).reshape(2, 2, 2, 2, 3, 5)  # image, place, place, patch row, patch column, channel
    for row, column in ((0, 0), (1, 4), (2, 3), (3, 5)):
        pixel = sequences[:, row % 2, column % 2, row // 2, column // 2]
        assert torch.equal(pixel, maps[:, :, row, column])


def separable_attention_by_loops(attention: nn.Module, norm: nn.Module, maps: Tensor) -> Tensor:
    """The paper's equations for one map [D, H, W] of normalized values, pixel by pixel."""
    dim, height, width = maps.shape
    weight, bias = attention.qkv_proj.weight.flatten(1), attention.qkv_proj.bias
    x = maps * norm.weight[:, None, None] + norm.bias[:, None, None]
    out = torch.empty_like(maps)
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        places = [(row, column) for row in range(top, height, 2) for column in range(left, width, 2)]
        projected = [weight @ x[:, row, column] + bias for row, column in places]
        total = sum(p[0].exp() for p in projected)
        context = sum(p[0].exp() / total * p[1 : 1 + dim] for p in projected)
        for (row, column), p in zip(places, projected, strict=True):
            mixed = p[1 + dim :].clamp(min=0) * context
            out[:, row, column] = attention.out_proj.weight.flatten(1) @ mixed + attention.out_proj.bias
    return out


@torch.no_grad()
def test_separable_attention_equals_a_loop_over_pixels():
    from timm.models.mobilevit import LinearSelfAttention

    attention = randomize(LinearSelfAttention(12)).double().requires_grad_(False)
    norm = randomize(nn.GroupNorm(1, 12)).double().requires_grad_(False)
    maps = torch.randn(12, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = SeparableAttention(attention, norm)(unfold(maps[None]).reshape(1, 48, 12))
    expected = separable_attention_by_loops(attention, norm, maps)
    torch.testing.assert_close(fold(ours.reshape(4, 12, 12), 6, 8)[0], expected, rtol=1e-12, atol=1e-12)


def attention_macs(kind: type[nn.Module], side: int) -> tuple[int, int]:
    """MACs of the first attention for images of that side: all of them, and those of products without weights."""
    entry = BY_NAME["mobilevit/xxs" if kind is Attention else "mobilevitv2/050"]
    with torch.device("meta"):
        model = entry.create(image_size=side).eval().deploy()
        attention = next(module for module in model.modules() if isinstance(module, kind))
        pixels, dim = (side // 8) ** 2, attention.proj.in_features
        tokens = torch.empty((4, pixels // 4, dim) if kind is Attention else (1, pixels, dim))
        with FlopCounterMode(display=False) as counter:
            attention(tokens)
    counts = counter.get_flop_counts()["Global"]
    return counter.get_total_flops() // 2, counts[torch.ops.aten.bmm] // 2


def test_separable_attention_is_linear_in_pixels_and_v1_quadratic():
    (small, _), (large, _) = (attention_macs(SeparableAttention, side) for side in (256, 512))
    context = 4 * 64 * 64  # one key per sequence, whatever its length
    assert large - context == 4 * (small - context)
    (_, small_products), (_, large_products) = (attention_macs(Attention, side) for side in (256, 512))
    assert large_products == 16 * small_products


# --- the inference form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", FIELD, ids=named)
def test_inference_form_has_no_norm_with_statistics(entry):
    assert not any(isinstance(module, nn.BatchNorm2d) for module in entry.create().deploy().modules())


@pytest.mark.parametrize("entry", FIELD_64, ids=named)
@torch.no_grad()
def test_logits_are_the_head_of_the_features(entry):
    model = randomize(entry.create(num_classes=7, in_chans=1))
    features = model.forward_features(make_images(2, 64, channels=1))
    assert features.shape == (2, model.feature_dim)
    torch.testing.assert_close(model.head(features), model(make_images(2, 64, channels=1)))


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [("mobilevit/xxs", 224, "192 or 256"), ("mobilevitv2/050", 32, "64"), ("mobilevit/field-32", 40, "32 or 48")],
)
def test_sizes_with_odd_maps_are_refused(name, size, nearest):
    message = rf"image_size must be a positive multiple of (64|16), .*, got {size}; take {nearest}$"
    with pytest.raises(ModelError, match=message):
        BY_NAME[name].create(image_size=size)


def test_widths_that_the_heads_do_not_divide_are_refused():
    with pytest.raises(ModelError, match=r"dims must be multiples of the 4 heads, got \(64, 80, 90\)"):
        BY_NAME["mobilevit/xxs"].create(dims=(64, 80, 90))


@torch.no_grad()
def test_other_sizes_can_be_chosen():
    model = randomize(BY_NAME["mobilevit/xxs"].create(num_classes=10, image_size=128))
    images = make_images(1, 128)
    assert relative_error(model.deploy()(images), model(images)) <= 1e-4


# --- learning ---------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """The digits of scikit-learn, [N, 1, 16, 16] in 0..1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return F.interpolate(images, size=16, mode="bilinear"), torch.from_numpy(data.target)


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    batches = [batch for _ in range(6) for batch in torch.randperm(len(images)).split(50)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilevit/field-32", "mobilevitv2/field-32"])
def test_images_normalized_by_mistake_lose_accuracy(name):
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BY_NAME[name].create(in_chans=1, image_size=16)
        train(model, images[:1400], labels[:1400])
    unseen, normalized = images[1400:], (images[1400:] - 0.45) / 0.225
    with torch.no_grad():
        right, wrong = (float((model(x).argmax(dim=1) == labels[1400:]).float().mean()) for x in (unseen, normalized))
    assert right >= 0.9  # measured 0.957 for both
    assert wrong <= 0.6  # measured 0.166 and 0.310
