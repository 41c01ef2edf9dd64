"""Next-ViT: convolution blocks and, at the end of every stage but the first, one block with attention.

Li et al. 2022, arXiv:2207.05501, and the authors' code (bytedance/Next-ViT). Blocks are timm's, and so are the names in
the state dict. NCB is the Next Convolution Block: a grouped convolution (MHCA) and an MLP. NTB is the Next Transformer
Block: efficient attention (E-MHSA) on most channels, MHCA on the others, and an MLP. The Next Hybrid Strategy repeats a
short pattern, (NCB x N + NTB x 1) x L, and scales a model by L alone; see `Stage`.

E-MHSA shortens keys and values with a pooling along the row-major sequence of tokens: s^2 neighbors in a row, which may
run on into the next row, not a square of s x s. The released weights were trained with that, so it stays.

Where we differ:
- Stages, stem and the mix of an NTB are parameters; timm fixes all widths and patterns.
- A number of tokens that s^2 does not divide is refused; the authors' code drops the remainder silently.
- `deploy` merges the norms in front of linear maps in float64. timm's own `reparameterize` is exact too, but leaves the
  norms behind convolutions, the last one, and the pooling for the converters.
- `has_attention=False` puts an NCB of the same width where each NTB was, for comparison.
- `field-32` and `field-64` are ours.

Shapes: B batch, C channels, H W image or map, N tokens, s^2 tokens per key, M = N / s^2 keys, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from timm.layers import calculate_drop_path_rates, make_divisible
from timm.models.nextvit import ConvNormAct, EfficientAttention, NextConvBlock, NextStage, NextTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError
from host.models.checks import require_drop_path, require_images
from host.models.deploy import Layer, absorb_affine, fold_batch_norms, inference_copy, replace_modules
from host.models.entry import ModelEntry, StateDict
from host.models.heads import renamed

_PAPER = "arXiv:2207.05501"
HEAD_DIM = 32
"""Channels per head, of attention and of grouped convolutions; widths are multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """(NCB x N + NTB x 1) x L; without a `transformer_width` there is no NTB.

    Attributes:
        num_conv: N.
        conv_width, transformer_width: channels that leave an NCB and an NTB.
        repeats: L.
        sr_ratio: s of E-MHSA, which averages s^2 tokens into each key; s^2 must divide the number of tokens.
    """

    num_conv: int
    conv_width: int = 0
    transformer_width: int = 0
    repeats: int = 1
    sr_ratio: int = 1

    def widths(self) -> list[int]:
        """Channels that leave each block."""
        last = [self.transformer_width] if self.transformer_width else []
        return ([self.conv_width] * self.num_conv + last) * self.repeats

    def kinds(self, *, has_attention: bool) -> list[type[nn.Module]]:
        """The class of each block."""
        kind = NextTransformerBlock if has_attention else NextConvBlock
        last = [kind] if self.transformer_width else []
        return ([NextConvBlock] * self.num_conv + last) * self.repeats


class NextViT(nn.Module):
    """Images [B, C, H, W] to features [B, D] and logits [B, K]; H = W = `image_size`, no other size.

    Weights do not depend on `image_size`: to go on at another one, build the model for it and load them.

    Args:
        stages: from the second on, each starts by halving the map; a map of odd size is halved to its larger half.
        stem_widths, stem_strides: one 3 x 3 convolution each.
        mix_ratio: the share of an NTB's channels that attention works on, rounded to a multiple of 32. In TFLite,
            attention with a single head (32 channels) stays outside XNNPACK.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0 in the first.
        has_attention: False replaces every NTB by an NCB of the same width.

    Raises:
        ModelError: no such layout exists, or images of another shape arrive.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int,
        image_size: int,
        stages: tuple[Stage, ...],
        stem_widths: tuple[int, ...] = (64, 32, 64, 64),
        stem_strides: tuple[int, ...] = (2, 1, 1, 2),
        mix_ratio: float = 0.75,
        drop_path: float = 0.1,
        has_attention: bool = True,
    ) -> None:
        super().__init__()
        _require_stem(image_size, stem_widths, stem_strides)
        _require_stages(stages)
        if has_attention:
            _require_attention(stages, _map_sizes(image_size, stem_strides, len(stages)), mix_ratio)
        require_drop_path(drop_path)
        self.image_size, self.in_chans = image_size, in_chans
        self.feature_dim = stages[-1].widths()[-1]
        self.stem = _make_stem((in_chans, *stem_widths), stem_strides)
        self.stages = _make_stages(stem_widths[-1], stages, mix_ratio, drop_path, has_attention=has_attention)
        self.norm = nn.BatchNorm2d(self.feature_dim)
        self.pool = GlobalPool()
        self.head = nn.Linear(self.feature_dim, num_classes)
        self.apply(_initialize)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, D], the mean over the normalized map of the last stage."""
        require_images(self, images_nchw)
        return self.pool(self.norm(self.stages(self.stem(images_nchw))))

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> Self:
        """The inference form: norms merged into the linear maps around them, poolings that every converter takes.

        litert-torch turns an average pooling with `ceil_mode` into STABLEHLO_REDUCE_WINDOW, which LiteRT's delegates
        do not run; `HalvingPool` is the same without.
        """
        model = inference_copy(self)
        if isinstance(model.pool, NormalizedPool):
            return model  # it was deployed before
        replace_modules(model, NextConvBlock, MergedConvBlock)
        replace_modules(model, NextTransformerBlock, MergedTransformerBlock)
        replace_modules(model, nn.AvgPool2d, lambda _: HalvingPool())
        model.pool, model.norm = NormalizedPool(model.norm), nn.Identity()
        fold_batch_norms(model)
        return model


class GlobalPool(nn.Module):
    """The mean over a map: [B, C, H, W] to [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class NormalizedPool(nn.Module):
    """Global pooling, then batch norm in evaluation mode: the same as norm, then pooling. [B, C, H, W] to [B, C]."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = affine(norm)
        self.register_buffer("scale", scale.to(norm.weight.dtype))
        self.register_buffer("shift", shift.to(norm.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) * self.scale + self.shift


class HalvingPool(nn.Module):
    """2 x 2 average pooling, rounding up: [B, C, H, W] to [B, C, ceil(H / 2), ceil(W / 2)].

    Doubling the last row or column of an odd map equals averaging over the part of a window that is inside.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            x = torch.cat([x, x[:, :, -1:]], dim=2)
        if x.shape[3] % 2:
            x = torch.cat([x, x[:, :, :, -1:]], dim=3)
        return F.avg_pool2d(x, 2)


class MergedConvBlock(nn.Module):
    """An NCB in evaluation mode, its norm merged into the MLP: [B, C, H, W] to the block's width and stride."""

    def __init__(self, block: NextConvBlock) -> None:
        super().__init__()
        self.patch_embed, self.mhca, self.mlp = block.patch_embed, block.mhca, block.mlp
        self.mlp.fc1 = merge_norms(block.mlp.fc1, block.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.mhca(x)
        return x + self.mlp(x)


class MergedTransformerBlock(nn.Module):
    """An NTB in evaluation mode, its norms merged into attention and MLP: [B, C, H, W] as a MergedConvBlock."""

    def __init__(self, block: NextTransformerBlock) -> None:
        super().__init__()
        self.patch_embed, self.projection = block.patch_embed, block.projection
        self.e_mhsa, self.mhca, self.mlp = MergedAttention(block.e_mhsa, block.norm1), block.mhca, block.mlp
        self.mlp.fc1 = merge_norms(block.mlp.fc1, block.norm2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # [B, C_attention, H, W]
        x = x + self.e_mhsa(x)
        y = self.projection(x)  # [B, C_convolution, H, W]
        x = torch.cat([x, y + self.mhca(y)], dim=1)
        return x + self.mlp(x)


class MergedAttention(nn.Module):
    """E-MHSA in evaluation mode on a map that nobody normalized: [B, C, H, W] to the same shape.

    Query, key and value hold the norm in front of them; key and value also the norm behind the pooling, which commutes
    with the first: an average of normalized tokens is the normalized average. The query holds the attention's scale.

    Tokens are made and unmade by permuting whole axes, which vanishes where maps are NHWC; timm's `reshape` and
    `transpose` remain in TFLite.
    """

    def __init__(self, attention: EfficientAttention, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        key_norms = [norm] if attention.norm is None else [norm, attention.norm]
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.tokens_per_key = attention.N_ratio
        self.q = _scaled(merge_norms(attention.q, norm), attention.scale)
        self.k = merge_norms(attention.k, *key_norms)
        self.v = merge_norms(attention.v, *key_norms)
        self.proj = attention.proj

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(b, h * w, c)  # [B, N, C]
        pooled = self._pool(tokens)  # [B, M, C]
        q, k, v = self._heads(self.q(tokens)), self._heads(self.k(pooled)), self._heads(self.v(pooled))
        attn = (q @ k.transpose(2, 3)).softmax(dim=-1)  # [B, heads, N, M]
        out = (attn @ v).transpose(1, 2).reshape(b, h * w, c)
        return self.proj(out).reshape(b, h, w, c).permute(0, 3, 1, 2)

    def _pool(self, tokens: Tensor) -> Tensor:
        """The mean of each run of consecutive tokens; runs go on into the next row."""
        if self.tokens_per_key == 1:
            return tokens
        b, n, c = tokens.shape
        return tokens.reshape(b, n // self.tokens_per_key, self.tokens_per_key, c).mean(dim=2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)  # [B, heads, N, C / heads]


def affine(*norms: nn.Module) -> tuple[Tensor, Tensor]:
    """What batch norms in evaluation mode do one after another, as float64 scale [C] and shift [C]."""
    scale, shift = torch.ones(()), torch.zeros(())
    for norm in norms:
        factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        scale = factor * scale
        shift = factor * (shift - norm.running_mean.double()) + norm.bias.detach().double()
    return scale, shift


def merge_norms(layer: Layer, *norms: nn.Module) -> Layer:
    """A linear layer or 1 x 1 convolution that does what `norms` in front of it did; exact in front of an average, too."""
    return absorb_affine(layer, *affine(*norms))


@torch.no_grad()
def _scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)
    return layer


def small(*, num_classes: int, in_chans: int, **options: Any) -> NextViT:
    """Next-ViT-S: L = 2 in stage 3, 20 blocks, 4 of them NTB."""
    return _paper(2, num_classes=num_classes, in_chans=in_chans, **{"drop_path": 0.1, **options})


def base(*, num_classes: int, in_chans: int, **options: Any) -> NextViT:
    """Next-ViT-B: L = 4 in stage 3, 30 blocks, 6 of them NTB."""
    return _paper(4, num_classes=num_classes, in_chans=in_chans, **{"drop_path": 0.2, **options})


def large(*, num_classes: int, in_chans: int, **options: Any) -> NextViT:
    """Next-ViT-L: L = 6 in stage 3, 40 blocks, 8 of them NTB."""
    return _paper(6, num_classes=num_classes, in_chans=in_chans, **{"drop_path": 0.2, **options})


def field_32(*, num_classes: int, in_chans: int, **options: Any) -> NextViT:
    """`field-32`, ours and not the paper's: 32-pixel images, maps of 16, 8 and 4 pixels, two NTB at 8 and one at 4.

    Against Next-ViT-S: 1 million parameters instead of 32; the stem is 3 convolutions of 32 channels that halve once
    instead of twice; 3 stages, the second (NCB + NTB) x 2 with s = 2; widths 64, 128, 192 instead of 96 to 1024.
    """
    return _field(
        **{"image_size": 32, "stem_strides": (2, 1, 1), **options}, num_classes=num_classes, in_chans=in_chans
    )


def field_64(*, num_classes: int, in_chans: int, **options: Any) -> NextViT:
    """`field-64`, ours: 64-pixel images; the stem halves twice, from there on `field_32`."""
    return _field(
        **{"image_size": 64, "stem_strides": (2, 2, 1), **options}, num_classes=num_classes, in_chans=in_chans
    )


def _paper(repeats: int, **options: Any) -> NextViT:
    stages = (
        Stage(num_conv=3, conv_width=96),
        Stage(num_conv=3, conv_width=192, transformer_width=256, sr_ratio=4),
        Stage(num_conv=4, conv_width=384, transformer_width=512, sr_ratio=2, repeats=repeats),
        Stage(num_conv=2, conv_width=768, transformer_width=1024),
    )
    return NextViT(**{"image_size": 224, "stages": stages, **options})


def _field(**options: Any) -> NextViT:
    stages = (
        Stage(num_conv=1, conv_width=64),
        Stage(num_conv=1, conv_width=96, transformer_width=128, sr_ratio=2, repeats=2),
        Stage(num_conv=1, conv_width=160, transformer_width=192),
    )
    return NextViT(**{"stages": stages, "stem_widths": (32, 32, 32), **options})


def from_timm(state: StateDict) -> dict[str, Tensor]:
    """Give timm's weights our names: only the classifier is called differently."""
    return renamed(state, {"head.fc.": "head."})


def _make_stem(widths: tuple[int, ...], strides: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(
        *(
            ConvNormAct(in_width, width, stride=stride)
            for (in_width, width), stride in zip(pairwise(widths), strides, strict=True)
        )
    )


def _make_stages(
    in_width: int, stages: tuple[Stage, ...], mix_ratio: float, drop_path: float, *, has_attention: bool
) -> nn.Sequential:
    rates = calculate_drop_path_rates(drop_path, [len(stage.widths()) for stage in stages], stagewise=True)
    in_widths = [in_width, *(stage.widths()[-1] for stage in stages)]
    return nn.Sequential(
        *(
            NextStage(
                in_widths[index],
                stage.widths(),
                stage.kinds(has_attention=has_attention),
                stride=2 if index else 1,
                sr_ratio=stage.sr_ratio,
                mix_block_ratio=mix_ratio,
                drop_path=rates[index],
                head_dim=HEAD_DIM,
            )
            for index, stage in enumerate(stages)
        )
    )


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _map_sizes(image_size: int, stem_strides: tuple[int, ...], num_stages: int) -> list[int]:
    """The side of each stage's map; every stride rounds up."""
    size = image_size
    for stride in stem_strides:
        size = -(-size // stride)
    return [-(-size // 2**index) for index in range(num_stages)]


def _require_stem(image_size: int, stem_widths: tuple[int, ...], stem_strides: tuple[int, ...]) -> None:
    if image_size < 1:
        raise ModelError(f"image_size must be 1 or more, got {image_size}; take the side of the images, in pixels")
    if not stem_widths or len(stem_widths) != len(stem_strides):
        raise ModelError(
            f"stem_widths {stem_widths} and stem_strides {stem_strides} need one value per convolution, at least 1"
        )
    if min(*stem_widths, *stem_strides) < 1:
        raise ModelError(f"stem_widths and stem_strides must be 1 or more, got {stem_widths} and {stem_strides}")


def _require_stages(stages: Sequence[Stage]) -> None:
    if not stages:
        raise ModelError("stages must hold at least one Stage, got none")
    for number, stage in enumerate(stages, start=1):
        if stage.num_conv < 0 or min(stage.repeats, stage.sr_ratio) < 1:
            raise ModelError(f"stage {number}: num_conv must be 0 or more, repeats and sr_ratio 1 or more, got {stage}")
        if not stage.widths():
            raise ModelError(f"stage {number} has no blocks: give it a num_conv or a transformer_width, got {stage}")
        for width in stage.widths():
            if width < HEAD_DIM or width % HEAD_DIM:
                raise ModelError(f"stage {number}: widths must be multiples of {HEAD_DIM}, the head width, got {width}")


def _require_attention(stages: Sequence[Stage], sizes: Sequence[int], mix_ratio: float) -> None:
    if not 0 < mix_ratio < 1:
        raise ModelError(f"mix_ratio must be above 0 and below 1, got {mix_ratio}")
    for number, (stage, size) in enumerate(zip(stages, sizes, strict=True), start=1):
        width = stage.transformer_width
        if not width:
            continue
        attention_width = make_divisible(int(width * mix_ratio), HEAD_DIM)
        if attention_width >= width:
            raise ModelError(
                f"stage {number}: mix_ratio {mix_ratio} gives attention all {width} channels of transformer_width and "
                "leaves none to the convolution; widen it or lower mix_ratio"
            )
        if size**2 % stage.sr_ratio**2:
            raise ModelError(
                f"stage {number}: sr_ratio {stage.sr_ratio} averages {stage.sr_ratio**2} tokens into each key, which "
                f"does not divide the {size}x{size} tokens; change sr_ratio or image_size"
            )


def _paper_entry(
    variant: str, build: Callable[..., NextViT], timm_name: str, parameters: int, macs: int, summary: str
) -> ModelEntry:
    return ModelEntry(
        family="nextvit",
        variant=variant,
        build=build,
        image_size=224,
        summary=summary,
        paper=_PAPER,
        parameters=parameters,
        macs=macs,
        is_exact=True,
        timm_name=timm_name,
        from_timm=from_timm,
    )


_field_entry = partial(ModelEntry, family="nextvit", paper=_PAPER, is_exact=False)

ENTRIES: tuple[ModelEntry, ...] = (
    _paper_entry("s", small, "nextvit_small", 31_763_368, 5_794_420_224, "20 blocks, 4 of them with attention"),
    _paper_entry("b", base, "nextvit_base", 44_818_856, 8_273_817_088, "30 blocks, 6 of them with attention"),
    _paper_entry("l", large, "nextvit_large", 57_874_344, 10_753_213_952, "40 blocks, 8 of them with attention"),
    _field_entry(
        variant="field-32",
        build=field_32,
        image_size=32,
        summary="ours: 7 blocks, 3 of them with attention, for 32-pixel images",
        parameters=1_025_386,
        macs=52_193_152,
        num_classes=10,
    ),
    _field_entry(
        variant="field-64",
        build=field_64,
        image_size=64,
        summary="ours: field-32 behind a stem that halves twice, for 64-pixel images",
        parameters=1_042_756,
        macs=52_873_984,
        num_classes=100,
    ),
)
