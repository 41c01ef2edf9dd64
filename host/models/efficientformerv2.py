"""EfficientFormerV2: convolutions in every block, attention on maps in the last two stages.

Li et al. 2023, arXiv:2212.08059; the backbone is timm's. Stage 3 attends at half its resolution and upsamples; between
stages 3 and 4, queries from a quarter of the positions attend to all of them.

Where we differ:
- timm keeps gathered attention biases between calls; here they do not outlive one, so that a model can be copied,
  exported and trained after it was evaluated.
- `field_64` is ours: narrower, and its third stage stays at 8 x 8.

The inference form, `deploy`, has the same outputs from other operations:
- The attention bias is a constant. It has gone through the first talking heads already, which are linear, and took
  their bias along.
- Queries are scaled before their product with the keys, by their batch norm: float16 ends at 65504.
- Talking heads are matrix products over the heads [heads, heads] @ [heads, N * N]. timm's 1 x 1 convolutions make the
  TFLite converter lay the attention out with the heads last; softmax is then not over the last axis, and becomes
  max, exp, sum and div.
- Plain subsampling of the query path (timm: a 1 x 1 average pooling of stride 2) is one more weight at the centre of the
  depthwise convolution of stride 2 beside it.
- Layer scales are folded into the batch norms before them, and those into their convolutions.
"""

from collections.abc import Callable

import timm
import torch
from timm.models.efficientformer_v2 import (
    Attention2d,
    Attention2dDownsample,
    EfficientFormerV2Block,
    LocalGlobalQuery,
)
from timm.models.efficientformer_v2 import EfficientFormerV2 as Backbone
from torch import Tensor, nn

from host.models.checks import require_drop_path, require_images, require_multiple
from host.models.deploy import replace_modules
from host.models.efficientformer import fold_layer_scale, scale_outputs
from host.models.entry import ModelEntry
from host.models.timm_classifier import TimmClassifier, from_timm

PAPER = "arXiv:2212.08059"
STRIDE, FIELD_STRIDE = 32, 16
"""Of the last stage; stage 3, at half of it, must have even maps for its strided attention."""
HALVED = "for the attention of stage 3 halves its maps"


class TalkingHeadsAttention(nn.Module):
    """The inference form of timm's `Attention2d`, whose layers it takes over: maps [B, C, H, W] to the same shape.

    Shapes: h heads, d width of a head's queries, e of its values, N tokens.
    """

    def __init__(self, attention: Attention2d) -> None:
        super().__init__()
        self.resolution = attention.resolution
        self.shrink = attention.stride_conv or nn.Identity()
        scale_outputs(attention.q.bn, attention.scale)
        self.q, self.k, self.v, self.v_local = attention.q, attention.k, attention.v, attention.v_local
        self.upsample = attention.upsample or nn.Identity()
        self.act, self.proj = attention.act, attention.proj
        self.num_heads = attention.num_heads
        before, after = attention.talking_head1, attention.talking_head2
        mix = before.weight.flatten(1)  # [h, h]
        bias = mix @ gather_bias(attention).flatten(1) + before.bias[:, None]
        self.register_buffer("mix_products", mix)
        self.register_buffer("bias_map", bias)  # [h, N * N]
        self.register_buffer("mix_weights", after.weight.flatten(1))
        self.register_buffer("mix_weights_bias", after.bias[:, None])  # [h, 1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(x)
        q, k = split_heads(self.q(x), self.num_heads), split_heads(self.k(x), self.num_heads)  # [B, h, d, N]
        v_map = self.v(x)
        v = split_heads(v_map, self.num_heads)  # [B, h, e, N]
        products = q.transpose(2, 3) @ k  # [B, h, N, N]
        scores = self.mix_products @ products.flatten(2) + self.bias_map
        weights = scores.reshape(products.shape).softmax(dim=-1)
        weights = (self.mix_weights @ weights.flatten(2) + self.mix_weights_bias).reshape(products.shape)
        x = join_heads(weights @ v.transpose(2, 3), self.resolution)
        return self.proj(self.act(self.upsample(x + self.v_local(v_map))))


class DownsampleAttention(nn.Module):
    """The inference form of timm's `Attention2dDownsample`, whose layers it takes over.

    Maps [B, C, H, W] to [B, C', H / 2, W / 2].

    Shapes: h heads, d width of a head's queries, e of its values, N tokens, M = N / 4 queries.
    """

    def __init__(self, attention: Attention2dDownsample) -> None:
        super().__init__()
        self.resolution = attention.resolution2
        self.q = join_queries(attention.q)
        scale_outputs(attention.q.proj.bn, attention.scale)
        self.k, self.v, self.v_local = attention.k, attention.v, attention.v_local
        self.act, self.proj = attention.act, attention.proj
        self.num_heads = attention.num_heads
        self.register_buffer("bias_map", gather_bias(attention))  # [h, M, N]

    def forward(self, x: Tensor) -> Tensor:
        q, k = split_heads(self.q(x), self.num_heads), split_heads(self.k(x), self.num_heads)  # [B, h, d, M and N]
        v_map = self.v(x)
        v = split_heads(v_map, self.num_heads)  # [B, h, e, N]
        weights = (q.transpose(2, 3) @ k + self.bias_map).softmax(dim=-1)  # [B, h, M, N]
        x = join_heads(weights @ v.transpose(2, 3), self.resolution)
        return self.proj(self.act(x + self.v_local(v_map)))


def gather_bias(attention: Attention2d | Attention2dDownsample) -> Tensor:
    """The bias of every pair of query and key, [heads, queries, keys], from the table by absolute offset."""
    return attention.attention_biases.detach()[:, attention.attention_bias_idxs]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Maps [B, heads * d, H, W] to [B, heads, d, H * W]."""
    return x.flatten(2).unflatten(1, (num_heads, -1))


def join_heads(x: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Tokens [B, heads, H * W, d] to maps [B, heads * d, H, W]."""
    return x.transpose(2, 3).flatten(1, 2).unflatten(2, resolution)


def join_queries(query: LocalGlobalQuery) -> nn.Sequential:
    """Depthwise convolution of stride 2 plus every second position, as one convolution; then the projection."""
    with torch.no_grad():
        query.local.weight[:, :, 1, 1] += 1  # the position that the subsampling reads
    return nn.Sequential(query.local, query.proj)


class EfficientFormerV2(TimmClassifier):
    """timm's backbone behind our protocol; its attention biases are gathered in every forward pass."""

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        require_images(self, images_nchw)
        features = super().forward_features(images_nchw)
        for module in self.modules():
            if isinstance(module, Attention2d | Attention2dDownsample):
                module.attention_bias_cache.clear()
        return features

    def rewrite_backbone(self) -> None:
        for block in self.backbone.modules():
            if isinstance(block, EfficientFormerV2Block):
                _fold_layer_scales(block)
        replace_modules(self.backbone, Attention2d, TalkingHeadsAttention)
        replace_modules(self.backbone, Attention2dDownsample, DownsampleAttention)


def s0(
    *, num_classes: int, in_chans: int, image_size: int = 224, distilled: bool = True, drop_path: float = 0.0
) -> EfficientFormerV2:
    """EfficientFormerV2-S0, 3.6 million parameters."""
    return _published("s0", num_classes, in_chans, image_size, distilled, drop_path)


def s1(
    *, num_classes: int, in_chans: int, image_size: int = 224, distilled: bool = True, drop_path: float = 0.0
) -> EfficientFormerV2:
    """EfficientFormerV2-S1, 6.2 million parameters."""
    return _published("s1", num_classes, in_chans, image_size, distilled, drop_path)


def s2(
    *, num_classes: int, in_chans: int, image_size: int = 224, distilled: bool = True, drop_path: float = 0.02
) -> EfficientFormerV2:
    """EfficientFormerV2-S2, 12.7 million parameters; stochastic depth 0.02."""
    return _published("s2", num_classes, in_chans, image_size, distilled, drop_path)


def large(
    *, num_classes: int, in_chans: int, image_size: int = 224, distilled: bool = True, drop_path: float = 0.1
) -> EfficientFormerV2:
    """EfficientFormerV2-L, 26.3 million parameters; stochastic depth 0.1."""
    return _published("l", num_classes, in_chans, image_size, distilled, drop_path)


def field_64(
    *, num_classes: int, in_chans: int, image_size: int = 64, distilled: bool = False, drop_path: float = 0.0
) -> EfficientFormerV2:
    """`field-64`, ours and not the paper's: stages at 16 x 16, 8 x 8, 8 x 8 and 4 x 4 for 64-pixel images.

    Against EfficientFormerV2-S0: 0.95 million parameters instead of 3.6, two blocks per stage instead of up to six,
    attention at 4 x 4 instead of 7 x 7, one head. Stage 3 does not shrink the maps: its attention, which halves them,
    would see 2 x 2. `layer_scale` starts at 0.1, as in our small variants of the first version.
    """
    require_multiple(image_size, FIELD_STRIDE, HALVED)
    require_drop_path(drop_path)
    backbone = Backbone(
        img_size=image_size,
        in_chans=in_chans,
        num_classes=0,
        embed_dims=(32, 48, 48, 112),
        depths=(2, 2, 2, 2),
        downsamples=(False, True, False, True),
        num_vit=1,
        drop_path_rate=drop_path,
        layer_scale_init_value=0.1,
    )
    return EfficientFormerV2(backbone, image_size=image_size, num_classes=num_classes, is_distilled=distilled)


def _published(
    variant: str, num_classes: int, in_chans: int, image_size: int, distilled: bool, drop_path: float
) -> EfficientFormerV2:
    require_multiple(image_size, STRIDE, HALVED)
    require_drop_path(drop_path)
    backbone = timm.create_model(
        f"efficientformerv2_{variant}",
        num_classes=0,
        in_chans=in_chans,
        img_size=image_size,
        drop_path_rate=drop_path,
    )
    return EfficientFormerV2(backbone, image_size=image_size, num_classes=num_classes, is_distilled=distilled)


def _fold_layer_scales(block: EfficientFormerV2Block) -> None:
    fold_layer_scale(block, "ls2", block.mlp.fc2.bn)
    if isinstance(block.token_mixer, Attention2d):
        fold_layer_scale(block, "ls1", block.token_mixer.proj.bn)


def _paper_entry(
    variant: str, build: Callable[..., EfficientFormerV2], parameters: int, macs: int, summary: str
) -> ModelEntry:
    return ModelEntry(
        family="efficientformerv2",
        variant=variant,
        build=build,
        image_size=224,
        summary=summary,
        paper=PAPER,
        parameters=parameters,
        macs=macs,
        is_exact=True,
        timm_name=f"efficientformerv2_{variant}",
        from_timm=from_timm,
    )


ENTRIES: tuple[ModelEntry, ...] = (
    _paper_entry(
        "s0", s0, 3_600_256, 395_892_544, "the smallest; attention in four blocks and between the last two stages"
    ),
    _paper_entry("s1", s1, 6_185_560, 651_969_640, "deeper and wider than S0, the same attention blocks"),
    _paper_entry("s2", s2, 12_710_112, 1_246_863_952, "eight attention blocks"),
    _paper_entry("l", large, 26_322_288, 2_552_546_880, "the largest; twelve attention blocks"),
    ModelEntry(
        family="efficientformerv2",
        variant="field-64",
        build=field_64,
        image_size=64,
        summary="our small EfficientFormerV2 for 64-pixel images; attention on 4 x 4 positions",
        paper=PAPER,
        parameters=950_068,
        macs=30_230_976,
        is_exact=False,
        num_classes=100,
    ),
)
