"""NiNformer: a per-token linear projection, multiplied by a gate that an MLP-Mixer block computes from all tokens.

Abdullah and Aydin 2024, arXiv:2403.02411; equations, sizes and defaults from the authors' code
(Abdullah-88/NiNformer). There is no attention, no class token, no position embedding (the token-mixing weights know
the positions), no norm before the head, and the gate is not squashed.

As in the authors' code, and unlike the equations suggest: one LayerNorm serves both places of a block
(`shared_norm=True`).

Where we differ:
- MNIST's geometry (28 x 28 x 1, patch 4) is our assumption; the released code holds CIFAR-10 only.
- `field_32` and `field_64` are ours: narrower, for boards.
- What computes the gate can be passed in (`make_gate`), so that ablations need no switches here.
- `deploy` multiplies the token FF's weights from the left, which needs no transposed tokens.

Shapes: B batch, C channels, H W image, N tokens, D embedding, F hidden width of every FF, K classes.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from host.errors import ModelError


class FeedForward(nn.Sequential):
    """Linear, GELU (erf), dropout, linear, dropout on the last axis: [..., dim] to the same shape."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )


class Mixer(nn.Module):
    """One MLP-Mixer block, [B, N, D] to the same shape: a FF along the tokens, then one along the channels.

    Source: Tolstikhin et al. 2021, arXiv:2105.01601; the inner network of NiNformer.
    """

    def __init__(self, *, num_tokens: int, embed_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(embed_dim)
        self.token_ff = FeedForward(num_tokens, hidden_dim, dropout)
        self.channel_norm = nn.LayerNorm(embed_dim)
        self.channel_ff = FeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_ff(self.token_norm(x).transpose(1, 2)).transpose(1, 2)  # [B, N, D]
        return x + self.channel_ff(self.channel_norm(x))


class GatingUnit(nn.Module):
    """(W x + b) * gate(x), element by element: [B, N, D] to the same shape; nothing squashes the gate."""

    def __init__(self, embed_dim: int, gate: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.gate(x)


def mixer_gate(*, num_tokens: int, embed_dim: int, hidden_dim: int, dropout: float) -> GatingUnit:
    """The paper's gating unit: the gate is a Mixer block."""
    mixer = Mixer(num_tokens=num_tokens, embed_dim=embed_dim, hidden_dim=hidden_dim, dropout=dropout)
    return GatingUnit(embed_dim, mixer)


class Block(nn.Module):
    """Gating unit and FF, each behind a LayerNorm and beside a residual: [B, N, D] to the same shape."""

    def __init__(self, unit: nn.Module, *, embed_dim: int, hidden_dim: int, dropout: float, shared_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.ff_norm = self.norm if shared_norm else nn.LayerNorm(embed_dim)
        self.unit = unit
        self.ff = FeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.unit(self.norm(x))
        return x + self.ff(self.ff_norm(x))


class NiNformer(nn.Module):
    """Images [B, C, H, W] to features [B, D] and logits [B, K]; H = W = `image_size`, no other size.

    Args:
        image_size: a multiple of `patch_size`.
        patch_size: side of a patch; the image gives N = (image_size / patch_size) ** 2 tokens.
        embed_dim: D.
        hidden_dim: F, the hidden width of all three FFs, along the tokens too.
        depth: number of blocks.
        dropout: in every FF, twice.
        shared_norm: one LayerNorm per block for gate and FF, as in the authors' code; False: 2 D more parameters each.
        make_gate: makes the gating unit of a block, [B, N, D] to [B, N, D], from `num_tokens`, `embed_dim`,
            `hidden_dim` and `dropout`.

    Raises:
        ModelError: the size cannot be cut into patches, or images of another size arrive.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int,
        image_size: int = 32,
        patch_size: int = 4,
        embed_dim: int = 256,
        hidden_dim: int = 512,
        depth: int = 4,
        dropout: float = 0.5,
        shared_norm: bool = True,
        make_gate: Callable[..., nn.Module] = mixer_gate,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ModelError(f"image_size must be a multiple of patch_size {patch_size}, got {image_size}")
        self.image_size = image_size
        self.feature_dim = embed_dim
        self.num_tokens = (image_size // patch_size) ** 2
        sizes = {"embed_dim": embed_dim, "hidden_dim": hidden_dim, "dropout": dropout}
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.blocks = nn.Sequential(
            *(
                Block(make_gate(num_tokens=self.num_tokens, **sizes), shared_norm=shared_norm, **sizes)
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(embed_dim, num_classes)

    def embed(self, images_nchw: Tensor) -> Tensor:
        """Tokens [B, N, D] of images, row by row."""
        height, width = images_nchw.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            size = self.image_size
            raise ModelError(f"this NiNformer takes images of {size}x{size} pixels only, got {height}x{width}")
        return self.patch_embed(images_nchw).flatten(2).transpose(1, 2)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, D], the mean over the tokens of the last block."""
        return self.blocks(self.embed(images_nchw)).mean(dim=1)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> "NiNformer":
        """A copy for inference and export, in evaluation mode: the same function, without transposes in the blocks."""
        model = copy.deepcopy(self).eval()
        for module in model.modules():
            if isinstance(module, Mixer):
                module.token_ff = LeftFeedForward(module.token_ff)
        return model
