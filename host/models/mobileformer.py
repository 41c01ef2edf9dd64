"""Mobile-Former: a MobileNet and a transformer of 3 to 6 tokens side by side, with a bridge both ways in every block.

Chen et al. 2022, arXiv:2108.05895. Where the paper is silent, layers, biases and block lists follow the public PyTorch
implementation AAboys/MobileFormer. It is in no package; `bench.mobileformer_reference` runs a checkout of it: all seven
variants have its parameters, and with the same weights its logits, to the rounding of float64. The tests keep some of its
logits. The variants are in `mobileformer_variants`.

As in that implementation:
- Keys and values of the bridges are the feature map itself, without projections; those of the Former are the tokens.
- What a Mobile -> Former bridge brings is multiplied by a gate that each token computes, between 0 and 2.
- Dynamic ReLU has slopes and no intercepts. The two of a bottleneck do not share their slopes.
- The first block has no bridges and a plain ReLU6. A skip goes around it where its shapes allow one.
- 26M: the 1 x 1 convolutions have four groups, with channel shuffles between them.

Where we differ:
- Tokens are [B, M, D], batch first.
- Queries are scaled (in Former -> Mobile: keys), not scores: there are fewer of them.

Shapes: B batch, C channels, H W map, M tokens, D token width (`embed_dim`), F features, K classes.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError
from host.models.checks import require_images
from host.models.deploy import fold_batch_norms, inference_copy

BRIDGE_HEADS = 2
FORMER_HEADS = 4
SQUEEZE = 4  # D / hidden width of the network that computes slopes
SECOND_EXPANSION = 4  # of a downsampling block
HEAD_EXPANSION = 6

Row = tuple[int, int, int]
"""(e, C, stride) of a block: expansion, output channels, and 2 for a downsampling block or 1 for an ordinary one."""


class AttentionCore(nn.Module):
    """softmax(q k) v, with q [B, h, N, d], k [B, h, d, L] and v [B, h, L, d]; gives [B, h, N, d].

    A module, so that converted graphs carry its name: int8 files keep it in float.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key).softmax(dim=-1) @ value


class MobileToFormer(nn.Module):
    """Tokens [B, M, D] read the map [B, C, H, W]; keys and values are the map itself, and a gate weighs the result."""

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.scale = (channels // BRIDGE_HEADS) ** -0.5
        self.query = nn.Linear(embed_dim, channels)
        self.attention = AttentionCore()
        self.gate = nn.Linear(embed_dim, channels)
        self.proj = nn.Linear(channels, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        query = _split_heads(self.query(tokens) * self.scale, BRIDGE_HEADS)  # [B, h, M, C / h]
        keys = _split_channels(x)  # [B, h, C / h, H W]
        read = _merge_heads(self.attention(query, keys, keys.transpose(2, 3)))  # [B, M, C]
        gate = 2 * hard_sigmoid(self.gate(tokens))
        return self.norm(tokens + self.proj(read * gate))


class Former(nn.Module):
    """Attention among the tokens [B, M, D], keys and values unprojected, then a feed-forward; norms after the sums."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.scale = (embed_dim // FORMER_HEADS) ** -0.5
        self.query = nn.Linear(embed_dim, embed_dim)
        self.attention = AttentionCore()
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = nn.Sequential(nn.Linear(embed_dim, 2 * embed_dim), nn.GELU(), nn.Linear(2 * embed_dim, embed_dim))
        self.ffn_norm = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query = _split_heads(self.query(tokens) * self.scale, FORMER_HEADS)  # [B, h, M, D / h]
        values = _split_heads(tokens, FORMER_HEADS)
        mixed = _merge_heads(self.attention(query, values.transpose(2, 3), values))  # [B, M, D]
        tokens = self.norm(tokens + self.proj(mixed))
        return self.ffn_norm(tokens + self.ffn(tokens))


class FormerToMobile(nn.Module):
    """Every pixel of the map [B, C, H, W] reads the tokens [B, M, D]; queries are the map itself."""

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.scale = (channels // BRIDGE_HEADS) ** -0.5
        self.key = nn.Linear(embed_dim, channels)
        self.value = nn.Linear(embed_dim, channels)
        self.attention = AttentionCore()

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        keys = _split_heads(self.key(tokens) * self.scale, BRIDGE_HEADS)  # [B, h, M, C / h]
        values = _split_heads(self.value(tokens), BRIDGE_HEADS)
        queries = _split_channels(x).transpose(2, 3)  # [B, h, H W, C / h]
        read = self.attention(queries, keys.transpose(2, 3), values)
        return x + read.transpose(2, 3).reshape(x.shape)


class DynamicReLU(nn.Module):
    """max(a1 x, a2 x) on [B, C, H, W], with slopes per channel that a token [B, D] sets: a1 in 0..2, a2 in -1..1.

    Slopes of 1 and 0, near which training starts, are a ReLU. XNNPACK has no int8 maximum, so in an int8 file each
    would cut the graph in two; they stay float32 there.
    Source: Chen et al. 2020, arXiv:2003.10027, here without intercepts.
    """

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(embed_dim, embed_dim // SQUEEZE)
        self.excite = nn.Linear(embed_dim // SQUEEZE, 2 * channels)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        first, second = self.slopes(token)
        return torch.maximum(x * first[:, :, None, None], x * second[:, :, None, None])

    def slopes(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """a1 and a2, each [B, C]."""
        first, second = hard_sigmoid(self.excite(self.squeeze(token).relu())).chunk(2, dim=1)
        return 2 * first, 2 * second - 1


class ChannelShuffle(nn.Module):
    """Deal the channels of [B, C, H, W] out anew: the first of every group, then the second of every group, ..."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch, self.groups, channels // self.groups, height * width)
        return grouped.transpose(1, 2).reshape(x.shape)


class Plain(nn.Sequential):
    """The first block: depthwise 3 x 3, ReLU6, 1 x 1, without tokens; a skip where shapes allow one."""

    def __init__(self, in_channels: int, expansion: int, channels: int, stride: int, *, groups: int) -> None:
        super().__init__(
            depthwise(in_channels, expansion, stride),
            nn.ReLU6(),
            _shuffle(in_channels, groups),
            pointwise(expansion * in_channels, channels, groups),
        )
        self.has_skip = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.has_skip else super().forward(x)


class Bottleneck(nn.Module):
    """1 x 1, depthwise 3 x 3, 1 x 1 at one resolution, with dynamic ReLUs; a skip where the width stays."""

    def __init__(self, in_channels: int, channels: int, *, expansion: int, embed_dim: int, groups: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = nn.Sequential(pointwise(in_channels, hidden, groups), _shuffle(groups, groups))
        self.act1 = DynamicReLU(hidden, embed_dim)
        self.depthwise = depthwise(hidden)
        self.act2 = DynamicReLU(hidden, embed_dim)
        self.project = nn.Sequential(pointwise(hidden, channels, groups), _shuffle(groups, groups))
        self.has_skip = in_channels == channels

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        hidden = self.act1(self.expand(x), token)
        out = self.project(self.act2(self.depthwise(hidden), token))
        return x + out if self.has_skip else out


class DownBottleneck(nn.Module):
    """Halve height and width, then widen once more: two pairs of depthwise 3 x 3 and 1 x 1, a skip around the second."""

    def __init__(self, in_channels: int, channels: int, *, expansion: int, embed_dim: int, groups: int) -> None:
        super().__init__()
        first, second = expansion * in_channels, SECOND_EXPANSION * channels
        self.depthwise1 = nn.Sequential(depthwise(in_channels, expansion, stride=2), _shuffle(in_channels, groups))
        self.act1 = DynamicReLU(first, embed_dim)
        self.project1 = pointwise(first, channels, groups)
        self.depthwise2 = nn.Sequential(depthwise(channels, SECOND_EXPANSION), _shuffle(channels, groups))
        self.act2 = DynamicReLU(second, embed_dim)
        self.project2 = pointwise(second, channels, groups)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        x = self.project1(self.act1(self.depthwise1(x), token))
        return x + self.project2(self.act2(self.depthwise2(x), token))


class Block(nn.Module):
    """Mobile -> Former, Former, Mobile, Former -> Mobile: map and tokens to map and tokens."""

    def __init__(self, mobile: nn.Module, in_channels: int, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.to_former = MobileToFormer(in_channels, embed_dim)
        self.former = Former(embed_dim)
        self.mobile = mobile
        self.to_mobile = FormerToMobile(channels, embed_dim)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.former(self.to_former(x, tokens))
        x = self.mobile(x, tokens[:, 0])
        return self.to_mobile(x, tokens), tokens


class Classifier(nn.Module):
    """Map [B, C, H, W] and token [B, D] to features [B, F]."""

    def __init__(self, channels: int, *, embed_dim: int, feature_dim: int, groups: int, dropout: float) -> None:
        super().__init__()
        hidden = HEAD_EXPANSION * channels
        self.expand = nn.Sequential(_shuffle(groups, groups), pointwise(channels, hidden, groups), nn.ReLU6())
        self.linear = nn.Linear(hidden + embed_dim, feature_dim)
        self.norm = nn.BatchNorm1d(feature_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        pooled = hard_swish(self.expand(x).mean(dim=(2, 3)))  # [B, 6 C]
        return self.dropout(hard_swish(self.norm(self.linear(torch.cat([pooled, token], dim=1)))))


class MobileFormer(nn.Module):
    """Images [B, C, H, W] to features [B, F] and logits [B, K]; H = W = `image_size`.

    Args:
        image_size: at least the stride of the last map.
        stem_channels: of the first convolution, which has stride 2.
        rows: (e, C, stride) of each block; the first has no tokens.
        num_tokens, embed_dim: M and D.
        feature_dim: F, between the last map and the head.
        groups: of every 1 x 1 convolution; from 2 on, channels are shuffled between them.
        dropout: on the features.

    Raises:
        ModelError: widths that heads or groups do not divide, counts below 1, other strides, an image too small, or
            images of another shape arrive.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_chans: int,
        num_classes: int,
        stem_channels: int,
        rows: tuple[Row, ...],
        num_tokens: int,
        embed_dim: int,
        feature_dim: int,
        groups: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _require_layout(image_size, stem_channels, rows, num_tokens, embed_dim, groups)
        self.image_size, self.in_chans, self.feature_dim = image_size, in_chans, feature_dim
        self.tokens = nn.Parameter(torch.randn(num_tokens, embed_dim))  # [M, D]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU6(),
        )
        self.first = Plain(stem_channels, *rows[0], groups=groups)
        self.blocks = nn.ModuleList(_make_blocks(rows, embed_dim, groups))
        last = rows[-1][1]
        self.to_former = MobileToFormer(last, embed_dim)
        self.classifier = Classifier(last, embed_dim=embed_dim, feature_dim=feature_dim, groups=groups, dropout=dropout)
        self.head = nn.Linear(feature_dim, num_classes)
        self.apply(_initialize)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        require_images(self, images_nchw)
        x = self.first(self.stem(images_nchw))
        tokens = self.tokens.repeat(len(x), 1, 1)  # [B, M, D]
        for block in self.blocks:
            x, tokens = block(x, tokens)
        tokens = self.to_former(x, tokens)
        return self.classifier(x, tokens[:, 0])  # [B, F]

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> Self:
        """The inference form: every batch norm folded, the one of the features into the linear layer before it.

        Nothing else changes: attention and channel shuffle have at most four axes, and dynamic ReLU, hard sigmoid and
        hard swish are elementwise operations that both converters know. Bridges that mask the other heads' channels
        instead of moving the heads to an axis of their own spare transpositions, but litert-torch then writes products
        that XNNPACK refuses, and a graph in pieces is slower.
        """
        model = inference_copy(self)
        fold_batch_norms(model)
        return model


def hard_sigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6


def hard_swish(x: Tensor) -> Tensor:
    return x * hard_sigmoid(x)


def pointwise(in_channels: int, channels: int, groups: int) -> nn.Sequential:
    """1 x 1 convolution and norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    )


def depthwise(in_channels: int, expansion: int = 1, stride: int = 1) -> nn.Sequential:
    """Depthwise 3 x 3 convolution, `expansion` outputs per channel, and norm."""
    channels = expansion * in_channels
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(channels),
    )


def _shuffle(shuffle_groups: int, conv_groups: int) -> nn.Module:
    return ChannelShuffle(shuffle_groups) if conv_groups > 1 else nn.Identity()


def _split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """[B, M, C] to [B, h, M, C / h]."""
    batch, length, channels = tokens.shape
    return tokens.reshape(batch, length, num_heads, channels // num_heads).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """[B, h, M, C / h] to [B, M, C]."""
    return x.transpose(1, 2).flatten(2)


def _split_channels(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, h, C / h, H W], for the heads of a bridge."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, BRIDGE_HEADS, channels // BRIDGE_HEADS, height * width)


def _make_blocks(rows: tuple[Row, ...], embed_dim: int, groups: int) -> Iterator[Block]:
    for (_, in_channels, _), (expansion, channels, stride) in itertools.pairwise(rows):
        make = Bottleneck if stride == 1 else DownBottleneck
        mobile = make(in_channels, channels, expansion=expansion, embed_dim=embed_dim, groups=groups)
        yield Block(mobile, in_channels, channels, embed_dim)


def _initialize(module: nn.Module) -> None:
    """As the public implementation: He's normal by fan-out for convolutions, and small linear layers."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels  # the groups do not divide it there
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def _require_layout(
    image_size: int, stem_channels: int, rows: tuple[Row, ...], num_tokens: int, embed_dim: int, groups: int
) -> None:
    if num_tokens < 1 or groups < 1:
        raise ModelError(f"num_tokens and groups must be 1 or more, got {num_tokens} and {groups}")
    if len(rows) < 2:
        raise ModelError(f"rows must be 2 or more, the first without tokens, got {len(rows)}")
    if embed_dim < FORMER_HEADS or embed_dim % FORMER_HEADS:
        raise ModelError(f"embed_dim must be a multiple of {FORMER_HEADS}, the heads of the Former, got {embed_dim}")
    if odd := [row for row in rows if row[2] not in (1, 2)]:
        raise ModelError(f"strides must be 1 or 2, got {odd[0][2]} in the row {odd[0]}")
    if odd := [row for row in rows if row[0] < 1]:
        raise ModelError(f"expansions must be 1 or more, got {odd[0][0]} in the row {odd[0]}")
    multiple = math.lcm(BRIDGE_HEADS, groups)
    if odd := [row for row in rows if row[1] < 1 or row[1] % multiple]:
        raise ModelError(f"channels must be multiples of {multiple} with groups={groups}, got {odd[0][1]}")
    if stem_channels * rows[0][0] % groups:
        raise ModelError(f"groups must divide the first block's {stem_channels * rows[0][0]} channels, got {groups}")
    stride = 2 * math.prod(row[2] for row in rows)
    if image_size < stride:
        raise ModelError(
            f"image_size must be at least {stride}, the stride of the last map, got {image_size}; take {stride} or more"
        )
