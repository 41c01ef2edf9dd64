"""EfficientFormer: timm's layout, both heads, the inference form, pooling at the edge, our small variants."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from bench.probes import make_images, photos, randomize, relative_error
from converters import coreml, tflite
from converters.mil import MilProgram
from device.engine import Engine
from host.errors import ModelError
from host.models.efficientformer import (
    ENTRIES,
    EfficientFormer,
    FixedGridAttention,
    GridAttention,
    MetaBlock1d,
    MetaBlock2d,
    field_32,
    field_64,
    l1,
)
from host.models.entry import ModelEntry
from host.models.heads import DistillationHeads
from host.models.measure import count_parameters

BY_VARIANT = {entry.variant: entry for entry in ENTRIES}
TINY = {"image_size": 32, "widths": (16, 32), "depths": (2, 2), "num_vit": 1, "num_heads": 2, "key_dim": 8}
DIGITS_LAYOUT = {
    "image_size": 16,
    "widths": (32, 64),
    "depths": (2, 3),
    "num_vit": 1,
    "num_heads": 4,
    "key_dim": 16,
    "layer_scale": 0.1,
}
L1_LAYOUT = {"image_size": 224, "widths": (48, 96, 224, 448), "depths": (3, 2, 6, 4), "num_vit": 1}
smallest_by_default = pytest.mark.parametrize(
    "variant", ["l1", pytest.param("l3", marks=pytest.mark.slow), pytest.param("l7", marks=pytest.mark.slow)]
)


def on_meta(entry: ModelEntry, **options: object) -> nn.Module:
    with torch.device("meta"):
        return entry.create(**options).eval()


def make_tiny(**changes: object) -> EfficientFormer:
    return EfficientFormer(**{**TINY, "in_chans": 3, "num_classes": 5, **changes})


def blocks_of(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


# --- our small variants ------------------------------------------------------------------------------------------------


def test_field_32_is_small_and_takes_features_at_two_depths():
    model = field_32(num_classes=8, in_chans=1)
    assert count_parameters(model) == 359_104
    assert model.feature_dim == 40 * 2 * 2 + 96


def test_field_64_takes_the_mean_of_every_stage():
    model = randomize(field_64(num_classes=8, in_chans=1))
    assert model.forward_features(make_images(2, 64, channels=1)).shape == (2, 48 + 96 + 160)


# --- timm's layout; `test_timm` compares outputs ------------------------------------------------------------------------


@smallest_by_default
def test_layout_is_timms(variant):
    import timm

    entry = BY_VARIANT[variant]
    with torch.device("meta"):
        reference = timm.create_model(entry.timm_name)
    kinds = [[type(block) for block in stage.blocks] for stage in reference.stages]
    assert [[type(block) for block in stage.blocks] for stage in on_meta(entry).stages] == kinds
    first_attention = kinds[-1].index(MetaBlock1d)
    assert kinds[-1][first_attention - 1].__name__ == "Flat"
    assert (first_attention == 1) == (variant == "l7")  # L7 flattens before the stage's first block


def test_stochastic_depth_grows_as_in_timm():
    import timm

    with torch.device("meta"):
        reference = timm.create_model("efficientformer_l1", drop_path_rate=0.3)
        ours = l1(num_classes=1000, in_chans=3, drop_path=0.3)
    rates = [
        [getattr(m, "drop_prob", 0) for n, m in model.named_modules() if "drop_path" in n]
        for model in (ours, reference)
    ]
    assert rates[0] == rates[1]
    assert max(rates[0]) == pytest.approx(0.3)


# --- the two heads ----------------------------------------------------------------------------------------------------


def test_logits_are_the_mean_of_both_heads():
    model = randomize(make_tiny(distilled=True))
    assert isinstance(model.head, DistillationHeads)
    images = make_images(2, 32)
    features = model.forward_features(images)
    classes, teacher = model.head.separate(features)
    torch.testing.assert_close(model(images), (classes + teacher) / 2)
    assert isinstance(model.deploy().head, nn.Linear)


# --- the inference form -----------------------------------------------------------------------------------------------


def test_no_norm_and_no_layer_scale_after_a_product_remains():
    deployed = randomize(l1(num_classes=10, in_chans=3)).deploy()
    assert not blocks_of(deployed, nn.BatchNorm2d)
    for block in blocks_of(deployed, MetaBlock2d):
        assert not any("Norm" in type(m).__name__ for m in block.modules() if m is not block.mlp)
        assert isinstance(block.ls2, nn.Identity)
    assert all(isinstance(m, nn.Identity) for b in blocks_of(deployed, MetaBlock1d) for m in (b.ls1, b.ls2))


def attention_and_tokens() -> tuple[nn.Module, Tensor]:
    attention = randomize(GridAttention(24, key_dim=64, num_heads=3, resolution=3)).requires_grad_(False)
    return attention.double(), torch.randn(1, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_scaled_queries_give_scaled_scores():
    attention, tokens = attention_and_tokens()
    fixed = FixedGridAttention(copy.deepcopy(attention))
    assert relative_error(fixed(tokens), attention(tokens)) < 1e-12


def test_scores_that_float16_cannot_hold_are_scaled_in_time():
    attention, tokens = attention_and_tokens()
    fixed, tokens = FixedGridAttention(copy.deepcopy(attention)).half(), 100 * tokens
    assert relative_error(fixed(tokens.half()), attention(tokens)) < 0.01
    assert attention.half()(tokens.half()).isnan().any()


class PoolProbe(nn.Module):
    """The pooling of the mixer alone, so that an error at the edge is not hidden by anything."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = MetaBlock2d(3).token_mixer
        self.head = nn.Linear(3 * 6 * 6, 2)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        return self.mixer(images_nchw).flatten(1)


def test_pooling_leaves_the_padding_out_in_both_formats(tmp_path: Path):
    probe, frames = PoolProbe().eval(), photos(6, count=1)
    flat = np.ones_like(frames)  # counting the padding would leave 5/9 at the corners and 2/3 at the edges
    engine = Engine(tflite.convert_float(probe, (1, 6, 6, 3), 2, tmp_path / "pool.tflite"))
    package = coreml.convert(probe, (1, 6, 6, 3), tmp_path / "p.mlpackage", input_spec_metadata={}, labels=["0", "1"])
    program = MilProgram(package)
    for images in (frames, flat):
        expected = probe.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        np.testing.assert_allclose(engine.features(images), expected[0], atol=1e-6)
        np.testing.assert_allclose(program.run({"images": images})["features"], expected, atol=2e-3)  # float16 weights
    assert not engine.features(flat).any()


# --- what the paper says of its blocks ---------------------------------------------------------------------------------


def test_an_untrained_block_is_nearly_the_identity():
    model = l1(num_classes=10, in_chans=3).eval()
    generator = torch.Generator().manual_seed(0)
    for block in [*blocks_of(model, MetaBlock2d), *blocks_of(model, MetaBlock1d)]:
        width = len(block.ls1.gamma)
        shape = (1, 49, width) if isinstance(block, MetaBlock1d) else (1, width, 14, 14)
        x = torch.randn(shape, generator=generator)
        assert relative_error(block(x).detach(), x) < 1e-3


def with_convolution_mixers(model: nn.Module) -> nn.Module:
    """Depthwise 3 x 3 convolutions in the place of the pooling, as in V2's ablation."""
    for block in blocks_of(model, MetaBlock2d):
        width = len(block.ls1.gamma)
        block.token_mixer = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    return model


@pytest.mark.parametrize(("variant", "share"), [("l1", 0.0022), ("l3", 0.0016), ("l7", 0.0010)])
def test_convolution_mixers_cost_few_parameters(variant, share):
    """The ablation says 12.25 to 12.27 million, which is rounded: exactly, L1 grows by 0.22 %."""
    with torch.device("meta"):
        model = BY_VARIANT[variant].create()
        before = count_parameters(model)
        assert count_parameters(with_convolution_mixers(model)) / before - 1 == pytest.approx(share, abs=1e-4)


def accuracy_on_digits(model: nn.Module, epochs: int = 10) -> float:
    """Train on 500 of scikit-learn's digits at 16 x 16, test on the other 1,297."""
    pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = F.interpolate(pixels.float().reshape(-1, 1, 8, 8) / 8 - 1, scale_factor=2, mode="bilinear")
    train, test = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tensor_split([500])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.025)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=10 * epochs)
    model.train()
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), digits[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((model.eval()(images[test]).argmax(dim=1) == digits[test]).float().mean())


@pytest.mark.slow
def test_convolution_mixers_are_as_accurate_as_pooling():
    """V2's ablation gains 0.6 points on ImageNet. Here, over three seeds, both reach 96.7 %.

    Digits enlarged to 32 x 32 and 40 epochs gave 96.4 % with pooling and 95.8 % with convolutions: no gain either.
    """
    accuracies = {"pool": 0.0, "convolution": 0.0}
    for seed in range(3):
        for mixer in accuracies:
            torch.manual_seed(seed)
            model = EfficientFormer(in_chans=1, num_classes=10, **DIGITS_LAYOUT)
            accuracies[mixer] += accuracy_on_digits(with_convolution_mixers(model) if mixer != "pool" else model) / 3
    assert accuracies["convolution"] >= accuracies["pool"] - 0.01
    assert min(accuracies.values()) > 0.95


# --- ours: taps, and an attention bias that is never stale ---------------------------------------------------------------


def test_attention_bias_is_never_stale():
    model = randomize(field_32(num_classes=8, in_chans=1))
    images = make_images(4, 32, channels=1)
    with torch.no_grad():
        expected = model(images)
        loaded = field_32(num_classes=8, in_chans=1).eval()
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(images), expected)
        model.stages[-1].blocks[-1].token_mixer.attention_biases += 1.0 * torch.arange(16)
        assert not torch.equal(model(images), expected)


def test_model_in_evaluation_mode_can_be_copied_and_differentiated_after_inference():
    model = field_32(num_classes=8, in_chans=1).eval()
    with torch.inference_mode():
        model(make_images(4, 32, channels=1))
    copy.deepcopy(model)(make_images(4, 32, channels=1)).sum().backward()


def test_grid_of_the_attention_follows_the_image_size():
    model = l1(num_classes=10, in_chans=3, image_size=96, distilled=False).eval()
    assert model.stages[-1].blocks[-1].token_mixer.attention_biases.shape == (8, 9)
    assert model(make_images(1, 96)).shape == (1, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 225}, "positive multiple of 32, .*, got 225; take 224 or 256"),
        ({"num_vit": 0}, r"num_vit must be 1\.\.4"),
        ({"depths": (3, 2)}, "need 4 values"),
        ({"tap_grids": (0, 0, 3, 1)}, "must divide the stages' sizes"),
        ({"tap_grids": (0, 0, 0, 7)}, "must end in 0 or 1"),
        ({"drop_path": 1.0}, "0 or more and below 1, got 1.0"),
    ],
)
def test_impossible_layouts_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        EfficientFormer(in_chans=3, num_classes=10, **(L1_LAYOUT | change))
