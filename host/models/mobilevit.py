"""MobileViT and MobileViTv2: MobileNet stages, in whose last three a transformer joins pixels across the whole map.

Mehta and Rastegari 2021, arXiv:2110.02178 (v1); 2022, arXiv:2206.02680 (v2: separable attention, linear in the number
of pixels, and one width for the whole model). Blocks, and names in the state dict, are timm's, after the authors' code.
Images are pixels in 0..1 **without mean and standard deviation**: the published weights were trained so.

A transformer sees the map as four sequences of N = H W / 4 pixels, one per place in a 2 x 2 patch. v1 attends within a
sequence. v2 weighs the pixels of a sequence with one softmax, sums the keys with these weights to one vector per
sequence, and multiplies every value with it.

Where we differ:
- `image_size` must be a multiple of twice the stride. Otherwise some map has an odd side (the last one at 224) and is
  resized to an even one, which the inference form leaves out. A model still trains on other sizes, as the papers'
  multi-scale sampling wants.
- The inference form keeps tokens channels last, and unfolds a map with two transposes that move whole runs of channels,
  at rank 4. timm moves single channels, at rank 6 in v2, and splits v1's heads at rank 5.
- v2's context is computed as `W_k (sum of s x) + b_k`, which equals `sum of s (W_k x + b_k)` because the weights s add
  up to 1. So keys are never made for every pixel, which saves MACs; those listed here are the paper's.
- The context is broadcast by the product itself: litert-torch 0.10 refuses timm's `expand_as`. With only that changed,
  timm's form has more transposes in TFLite, and its softmax in pieces.
- Scale and shift of norms, and the 1 / sqrt(D / heads) of v1, are in the linear layers that follow. What remains of a
  norm carries `LayerNorm` in its name and attention `Attention`, the scopes that stay float32 in integer graphs; a group
  norm of one group is a layer norm over channels and pixels.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError
from host.models.checks import require_multiple
from host.models.deploy import Layer, absorb_affine, make_linear, replace_modules
from host.models.entry import ModelEntry
from host.models.timm_classifier import TimmClassifier, from_timm

V1_PAPER, V2_PAPER = "arXiv:2110.02178", "arXiv:2206.02680"
PATCH_SIZE = 2
PLACES = PATCH_SIZE**2  # in a patch, and so sequences
STEM_STRIDE = 2
NUM_HEADS = 4  # of v1
STRIDES = (1, 2, 2, 2, 2)  # of stages 1 to 5
DEPTHS = (2, 4, 3)  # transformer layers of stages 3, 4 and 5
V2_WIDTHS = (64, 128, 256, 384, 512)  # of stages 1 to 5, at width 1
_STYLE = {"stem_type": "3x3", "stem_pool": "", "downsample": "", "act_layer": "silu"}


class MobileViT(TimmClassifier):
    """Images [B, C, H, W] in 0..1 to features [B, D] and logits [B, K]."""

    def rewrite_backbone(self) -> None:
        replace_modules(self.backbone, MobileVitBlock, FusingBlock)


class MobileViTv2(TimmClassifier):
    """Images [B, C, H, W] in 0..1 to features [B, D] and logits [B, K]."""

    def rewrite_backbone(self) -> None:
        replace_modules(self.backbone, MobileVitV2Block, TokenBlock)


def unfold(maps: Tensor) -> Tensor:
    """Maps [B, D, H, W] to four sequences [B * 4, N, D], N = H W / 4, one per place in a 2 x 2 patch.

    Raises:
        ModelError: a side is odd.
    """
    batch, dim, height, width = maps.shape
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise ModelError(f"a map of {height}x{width} has an odd side; give the inference form images of its own size")
    rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
    x = maps.permute(0, 2, 3, 1)  # [B, H, W, D], how TFLite holds maps anyway
    x = x.reshape(batch, rows, PATCH_SIZE, width * dim).transpose(1, 2)  # [B, 2, H / 2, W D]
    x = x.reshape(batch * PATCH_SIZE, rows * columns, PATCH_SIZE, dim).transpose(1, 2)  # [B 2, 2, N, D]
    return x.reshape(batch * PLACES, rows * columns, dim)


def fold(sequences: Tensor, height: int, width: int) -> Tensor:
    """Sequences [B * 4, N, D] back to maps [B, D, H, W]."""
    rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
    dim = sequences.shape[-1]
    x = sequences.reshape(-1, PATCH_SIZE, rows * columns, dim).transpose(1, 2)  # [B 2, N, 2, D]
    x = x.reshape(-1, PATCH_SIZE, rows, width * dim).transpose(1, 2)  # [B, H / 2, 2, W D]
    return x.reshape(-1, height, width, dim).permute(0, 3, 1, 2)


class TokenBlock(nn.Module):
    """v2's block for inference: maps [B, C, H, W] to maps of the same shape."""

    def __init__(self, block: MobileVitV2Block) -> None:
        super().__init__()
        self.local = nn.Sequential(block.conv_kxk, block.conv_1x1)
        self.transformer = nn.Sequential(*map(SeparableEncoder, block.transformer))
        self.norm = MapLayerNorm(block.norm.eps)
        self.conv_proj = block.conv_proj
        self.conv_proj.conv = absorb_norm(self.conv_proj.conv, block.norm)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = unfold(self.local(x))  # [B 4, N, D]
        x = x.reshape(batch, height * width, -1)  # [B, 4 N, D]
        x = self.norm(self.transformer(x))
        x = x.reshape(batch * PLACES, -1, x.shape[-1])
        return self.conv_proj(fold(x, height, width))


class SeparableEncoder(nn.Module):
    """v2's transformer layer on [B, 4 N, D]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = MapLayerNorm(layer.norm1.eps), MapLayerNorm(layer.norm2.eps)
        self.attention = SeparableAttention(layer.attn, layer.norm1)
        fc1, fc2 = as_linear(layer.mlp.fc1), as_linear(layer.mlp.fc2)
        self.mlp = nn.Sequential(absorb_norm(fc1, layer.norm2), layer.mlp.act, fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SeparableAttention(nn.Module):
    """v2's attention on normalized tokens [B, 4 N, D], for each of the 4 sequences alone."""

    def __init__(self, attention: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        dim = attention.embed_dim
        projection = absorb_norm(as_linear(attention.qkv_proj), norm)
        self.query, self.key, self.value = split_linear(projection, [1, dim, dim])
        self.proj = as_linear(attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        batch, pixels, dim = x.shape
        sequences = batch * PLACES, pixels // PLACES
        scores = self.query(x).reshape(sequences[0], 1, sequences[1]).softmax(dim=-1)  # [B 4, 1, N]
        context = self.key(scores @ x.reshape(*sequences, dim))  # [B 4, 1, D]
        values = F.relu(self.value(x)).reshape(*sequences, dim)  # [B 4, N, D]
        return self.proj((values * context).reshape(batch, pixels, dim))


class FusingBlock(nn.Module):
    """v1's block for inference: maps [B, C, H, W] to maps of the same shape."""

    def __init__(self, block: MobileVitBlock) -> None:
        super().__init__()
        self.local = nn.Sequential(block.conv_kxk, block.conv_1x1)
        self.transformer = nn.Sequential(*map(Encoder, block.transformer))
        self.norm = plain_layer_norm(block.norm)
        self.conv_proj, self.conv_fusion = block.conv_proj, block.conv_fusion
        self.conv_proj.conv = absorb_norm(self.conv_proj.conv, block.norm)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = self.norm(self.transformer(unfold(self.local(x))))  # [B 4, N, D]
        y = self.conv_proj(fold(tokens, height, width))
        return self.conv_fusion(torch.cat((x, y), dim=1))


class Encoder(nn.Module):
    """v1's transformer layer on [B, N, D]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_layer_norm(layer.norm1), plain_layer_norm(layer.norm2)
        self.attention = Attention(layer.attn, layer.norm1)
        self.mlp = nn.Sequential(absorb_norm(layer.mlp.fc1, layer.norm2), layer.mlp.act, layer.mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """v1's attention on normalized tokens [B, N, D]."""

    def __init__(self, attention: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        dim = attention.proj.in_features
        self.num_heads = attention.num_heads
        self.query, self.key, self.value = split_linear(absorb_norm(attention.qkv, norm), [dim] * 3)
        for parameter in self.query.parameters():
            parameter.mul_(attention.scale)
        self.proj = attention.proj

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split_heads(project(x)) for project in (self.query, self.key, self.value))
        scores = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, heads, N, N]
        return self.proj((scores @ v).transpose(1, 2).reshape(x.shape))

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        x = x.reshape(batch, tokens, self.num_heads, dim // self.num_heads)
        return x.transpose(1, 2)  # [B, heads, N, D / heads]


class MapLayerNorm(nn.Module):
    """Normalize each image over all its pixels and channels, [B, N, D]; scale and shift are in what follows."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], eps=self.eps)


def plain_layer_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The same norm without scale and shift."""
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


def as_linear(conv: nn.Conv2d) -> nn.Linear:
    """A 1 x 1 convolution as a linear layer on the last axis."""
    return make_linear(conv.weight.flatten(1), conv.bias)


def split_linear(linear: nn.Linear, sizes: list[int]) -> list[nn.Linear]:
    """Linear layers that each give that many of a linear layer's outputs."""
    return [make_linear(*parts) for parts in zip(linear.weight.split(sizes), linear.bias.split(sizes), strict=True)]


def absorb_norm(layer: Layer, norm: nn.LayerNorm | nn.GroupNorm) -> Layer:
    """The linear layer or 1 x 1 convolution with the scale and shift of the norm before it."""
    return absorb_affine(layer, norm.weight, norm.bias)


def mobilevit(
    *,
    num_classes: int,
    in_chans: int,
    image_size: int = 256,
    widths: tuple[int, ...],
    dims: tuple[int, ...],
    head_width: int,
    expansion: float = 4,
    strides: tuple[int, ...] = STRIDES,
) -> MobileViT:
    """MobileViT v1.

    Args:
        num_classes: K.
        in_chans: C.
        image_size: H = W, a multiple of twice the stride; of 64 for the published variants.
        widths: channels of the five stages.
        dims: D of the transformers of stages 3 to 5, multiples of the 4 heads.
        head_width: channels of the last 1 x 1 convolution, and so of the features.
        expansion: of the inverted residual blocks.
        strides: of the five stages.

    Raises:
        ModelError: some transformer's map would have an odd side, or its D is no multiple of the heads.
    """
    if any(dim % NUM_HEADS for dim in dims):
        raise ModelError(f"dims must be multiples of the {NUM_HEADS} heads, got {dims}")
    transformers = [
        ByoBlockCfg(
            type="mobilevit",
            d=1,
            c=width,
            s=1,
            block_kwargs=_layers(depth) | {"transformer_dim": dim, "num_heads": NUM_HEADS},
        )
        for width, dim, depth in zip(widths[2:], dims, DEPTHS, strict=True)
    ]
    config = ByoModelCfg(
        blocks=_stages(widths, strides, expansion, transformers, depth=3),
        stem_chs=16,
        num_features=head_width,
        **_STYLE,
    )
    backbone = _backbone(config, strides, image_size, in_chans)
    return MobileViT(backbone, image_size=image_size, num_classes=num_classes)


def mobilevit_v2(
    *,
    num_classes: int,
    in_chans: int,
    image_size: int = 256,
    stem: int = 32,
    widths: tuple[int, ...] = V2_WIDTHS,
    strides: tuple[int, ...] = STRIDES,
) -> MobileViTv2:
    """MobileViTv2; the features are the last stage's, and the transformers' D is half of a stage's width.

    Arguments and errors are those of `mobilevit`; `stem` is the channels of the stem.
    """
    transformers = [
        ByoBlockCfg(type="mobilevit2", d=1, c=width, s=1, br=0.5, gs=1, block_kwargs=_layers(depth))
        for width, depth in zip(widths[2:], DEPTHS, strict=True)
    ]
    config = ByoModelCfg(blocks=_stages(widths, strides, 2, transformers, depth=2), stem_chs=stem, **_STYLE)
    backbone = _backbone(config, strides, image_size, in_chans)
    return MobileViTv2(backbone, image_size=image_size, num_classes=num_classes)


def field(*, num_classes: int, in_chans: int, image_size: int = 64) -> MobileViT:
    """Ours and not the paper's: MobileViT with narrower stages than XXS, for images of 32 to 96 pixels.

    Stage 3 keeps its resolution, and so does stage 2 below 64 pixels, so that the three transformers see maps of
    16 x 16, 8 x 8 and 4 x 4 for images of 64 and of 32 pixels alike; the published strides would leave 2 x 2, one patch.
    """
    return mobilevit(
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=image_size,
        widths=(16, 24, 32, 48, 64),
        dims=(48, 64, 80),
        head_width=256,
        expansion=2,
        strides=_field_strides(image_size),
    )


def field_v2(*, num_classes: int, in_chans: int, image_size: int = 64) -> MobileViTv2:
    """Ours and not the paper's: MobileViTv2 with the resolutions of `field`, and early stages narrower than late ones.

    The width multiplier that makes the first two stages this cheap, 0.25, would leave 128 features.
    """
    return mobilevit_v2(
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=image_size,
        stem=16,
        widths=(16, 32, 96, 128, 192),
        strides=_field_strides(image_size),
    )


def _field_strides(image_size: int) -> tuple[int, ...]:
    return (1, 2 if image_size >= 64 else 1, 1, 2, 2)


def _stages(
    widths: tuple[int, ...], strides: tuple[int, ...], expansion: float, transformers: list[ByoBlockCfg], *, depth: int
) -> tuple[Any, ...]:
    """Five stages: inverted residual blocks, `depth` of them in stage 2, and a transformer in each of the last three."""

    def block(stage: int) -> ByoBlockCfg:
        return ByoBlockCfg(
            type="bottle",
            d=depth if stage == 1 else 1,
            c=widths[stage],
            s=strides[stage],
            gs=1,
            br=expansion,
            block_kwargs={"bottle_in": True, "linear_out": True},
        )

    return (block(0), block(1), *((block(2 + index), transformer) for index, transformer in enumerate(transformers)))


def _layers(depth: int) -> dict[str, int]:
    return {"transformer_depth": depth, "patch_size": PATCH_SIZE}


def _backbone(config: ByoModelCfg, strides: tuple[int, ...], image_size: int, in_chans: int) -> ByobNet:
    multiple = PATCH_SIZE * STEM_STRIDE * prod(strides)
    require_multiple(image_size, multiple, "so that every map with a transformer has even sides")
    return ByobNet(config, num_classes=0, in_chans=in_chans)


_entry = partial(ModelEntry, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _published(variant: str, *, parameters: int, macs: int, **layout: Any) -> ModelEntry:
    return _entry(
        family="mobilevit",
        variant=variant,
        build=partial(mobilevit, **layout),
        image_size=256,
        summary=f"MobileViT-{variant.upper()}; pixels in 0..1, not normalized",
        paper=V1_PAPER,
        parameters=parameters,
        macs=macs,
        is_exact=True,
        timm_name=f"mobilevit_{variant}",
        from_timm=from_timm,
    )


def _published_v2(percent: int, *, parameters: int, macs: int) -> ModelEntry:
    return _entry(
        family="mobilevitv2",
        variant=f"{percent:03}",
        build=partial(
            mobilevit_v2, stem=32 * percent // 100, widths=tuple(width * percent // 100 for width in V2_WIDTHS)
        ),
        image_size=256,
        summary=f"MobileViTv2 of width {percent / 100:g}; pixels in 0..1, not normalized",
        paper=V2_PAPER,
        parameters=parameters,
        macs=macs,
        is_exact=True,
        timm_name=f"mobilevitv2_{percent:03}",
        from_timm=from_timm,
    )


def _field(
    family: str, build: Callable[..., nn.Module], image_size: int, num_classes: int, *, parameters: int, macs: int
) -> ModelEntry:
    return _entry(
        family=family,
        variant=f"field-{image_size}",
        build=partial(build, image_size=image_size),
        image_size=image_size,
        summary=f"our small model of this family for {image_size}-pixel images; pixels in 0..1, not normalized",
        paper=V1_PAPER if family == "mobilevit" else V2_PAPER,
        parameters=parameters,
        macs=macs,
        is_exact=False,
        num_classes=num_classes,
    )


ENTRIES: tuple[ModelEntry, ...] = (
    _published(
        "xxs",
        widths=(16, 24, 48, 64, 80),
        dims=(64, 80, 96),
        head_width=320,
        expansion=2,
        parameters=1_272_024,
        macs=407_364_096,
    ),
    _published(
        "xs", widths=(32, 48, 64, 80, 96), dims=(96, 120, 144), head_width=384, parameters=2_317_848, macs=1_025_911_808
    ),
    _published(
        "s",
        widths=(32, 64, 96, 128, 160),
        dims=(144, 192, 240),
        head_width=640,
        parameters=5_578_632,
        macs=2_000_831_488,
    ),
    _field("mobilevit", field, 32, 10, parameters=599_850, macs=42_633_216),
    _field("mobilevit", field, 64, 100, parameters=622_980, macs=44_388_864),
    _published_v2(50, parameters=1_370_593, macs=464_594_944),
    _published_v2(75, parameters=2_866_009, macs=1_027_980_288),
    _published_v2(100, parameters=4_901_841, macs=1_812_090_880),
    _published_v2(125, parameters=7_478_089, macs=2_816_926_720),
    _published_v2(150, parameters=10_594_753, macs=4_042_487_808),
    _published_v2(175, parameters=14_251_833, macs=5_488_774_144),
    _published_v2(200, parameters=18_449_329, macs=7_155_785_728),
    _field("mobilevitv2", field_v2, 32, 10, parameters=567_299, macs=36_738_432),
    _field("mobilevitv2", field_v2, 64, 100, parameters=584_669, macs=38_488_320),
)
