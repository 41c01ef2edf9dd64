"""What NiNformer is compared with: ViT, Local-ViT and MLP-Mixer of its size, and NiNformer with parts replaced.

The paper's baselines are not published in code, so these are ours: NiNformer's patches, width 256, hidden width 512,
dropout in every FF, and the mean over the tokens before the head, so that only the blocks differ. Each rival keeps
what its own paper gives it and NiNformer lacks: ViT a learned position embedding, all three a LayerNorm before the head.

- ViT: Dosovitskiy et al. 2020, arXiv:2010.11929, without the class token; 5 blocks of 4 heads, no dropout in attention.
- Local-ViT: the same, but a token attends only to the 3 x 3 tokens around it, itself included.
- MLP-Mixer: Tolstikhin et al. 2021, arXiv:2105.01601; NiNformer's own inner block, 4 of them (as many blocks as
  NiNformer has) or 8 (as many parameters).

The ablations keep the whole of NiNformer but for the gating unit of each block.

Shapes: B batch, C channels, N tokens, D embedding, F hidden width, K classes.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.models.ninformer import FeedForward, GatingUnit, Mixer, NiNformer

PATCH_SIZE = 4
EMBED_DIM = 256
HIDDEN_DIM = 512
VIT_DEPTH = 5
"""Parameters within 1 % of NiNformer's four blocks."""
NUM_HEADS = 4


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]; `mask` [N, N] is True where a token may look, None: everywhere."""

    def __init__(self, dim: int, num_heads: int, mask: Tensor | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]
            for part in self.qkv(x).chunk(3, dim=2)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, N, D]


class AttentionBlock(nn.Module):
    """The encoder block of ViT: attention and FF, each behind a LayerNorm and beside a residual."""

    def __init__(
        self, *, embed_dim: int, hidden_dim: int, num_heads: int, dropout: float, mask: Tensor | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads, mask)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ff = FeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ff(self.norm2(x))


def neighbour_mask(side: int, *, radius: int = 1) -> Tensor:
    """Who sees whom on a grid of `side` x `side` tokens: bool [N, N], True up to `radius` rows and columns away."""
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    return far <= radius


class TokenClassifier(nn.Module):
    """Patches, position embedding if asked for, blocks, LayerNorm, mean over the tokens, head."""

    def __init__(
        self, blocks: nn.Sequential, *, image_size: int, num_classes: int, in_chans: int, pos_embed: bool
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.feature_dim = EMBED_DIM
        self.patch_embed = nn.Conv2d(in_chans, EMBED_DIM, PATCH_SIZE, stride=PATCH_SIZE)
        self.pos_embed = None
        if pos_embed:
            positions = torch.empty(1, (image_size // PATCH_SIZE) ** 2, EMBED_DIM)
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
        self.blocks = blocks
        self.norm = nn.LayerNorm(EMBED_DIM)
        self.head = nn.Linear(EMBED_DIM, num_classes)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, D]."""
        x = self.patch_embed(images_nchw).flatten(2).transpose(1, 2)  # [B, N, D]
        x = x if self.pos_embed is None else x + self.pos_embed
        return self.norm(self.blocks(x)).mean(dim=1)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> "TokenClassifier":
        """A copy in evaluation mode."""
        return copy.deepcopy(self).eval()


class SumUnit(GatingUnit):
    """Ablation: W x + b + gate(x) instead of the product."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.gate(x)


class LearnedTable(nn.Module):
    """Ablation: a gate that does not look at its input, a learned table [N, D] that starts at ones."""

    def __init__(self, num_tokens: int, embed_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(num_tokens, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.table.expand_as(x)


class ChannelMixer(nn.Module):
    """Ablation: the Mixer without its token FF, so that the gate of a token sees this token only."""

    def __init__(self, *, embed_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.channel_norm = nn.LayerNorm(embed_dim)
        self.channel_ff = FeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channel_ff(self.channel_norm(x))


def sum_gate(*, num_tokens: int, embed_dim: int, hidden_dim: int, dropout: float) -> nn.Module:
    """For `NiNformer(make_gate=...)`: the sum of projection and Mixer."""
    mixer = Mixer(num_tokens=num_tokens, embed_dim=embed_dim, hidden_dim=hidden_dim, dropout=dropout)
    return SumUnit(embed_dim, mixer)


def table_gate(*, num_tokens: int, embed_dim: int, hidden_dim: int, dropout: float) -> nn.Module:
    """For `NiNformer(make_gate=...)`: the product with a learned table."""
    return GatingUnit(embed_dim, LearnedTable(num_tokens, embed_dim))


def no_token_ff_gate(*, num_tokens: int, embed_dim: int, hidden_dim: int, dropout: float) -> nn.Module:
    """For `NiNformer(make_gate=...)`: the product with a gate that sees one token."""
    return GatingUnit(embed_dim, ChannelMixer(embed_dim=embed_dim, hidden_dim=hidden_dim, dropout=dropout))


def vit(
    *, image_size: int, num_classes: int, in_chans: int, dropout: float, radius: int | None = None
) -> TokenClassifier:
    """ViT of 5 blocks; with `radius`, Local-ViT."""
    mask = None if radius is None else neighbour_mask(image_size // PATCH_SIZE, radius=radius)
    sizes = {"embed_dim": EMBED_DIM, "hidden_dim": HIDDEN_DIM, "num_heads": NUM_HEADS}
    blocks = nn.Sequential(*(AttentionBlock(**sizes, dropout=dropout, mask=mask) for _ in range(VIT_DEPTH)))
    return TokenClassifier(blocks, image_size=image_size, num_classes=num_classes, in_chans=in_chans, pos_embed=True)


def mlp_mixer(*, image_size: int, num_classes: int, in_chans: int, dropout: float, depth: int) -> TokenClassifier:
    """MLP-Mixer of `depth` blocks."""
    num_tokens = (image_size // PATCH_SIZE) ** 2
    sizes = {"num_tokens": num_tokens, "embed_dim": EMBED_DIM, "hidden_dim": HIDDEN_DIM}
    blocks = nn.Sequential(*(Mixer(**sizes, dropout=dropout) for _ in range(depth)))
    return TokenClassifier(blocks, image_size=image_size, num_classes=num_classes, in_chans=in_chans, pos_embed=False)


CLASSIFIERS: Mapping[str, Callable[..., nn.Module]] = {
    "NiNformer": NiNformer,
    "MLP-Mixer, 8 blocks": partial(mlp_mixer, depth=8),
    "ViT": vit,
    "MLP-Mixer, 4 blocks": partial(mlp_mixer, depth=4),
    "NiNformer, sum instead of product": partial(NiNformer, make_gate=sum_gate),
    "NiNformer, learned table as gate": partial(NiNformer, make_gate=table_gate),
    "NiNformer, no token FF": partial(NiNformer, make_gate=no_token_ff_gate),
    "Local-ViT": partial(vit, radius=1),
}
"""By name, in the order of the tables; each takes `image_size`, `num_classes`, `in_chans` and `dropout`."""
