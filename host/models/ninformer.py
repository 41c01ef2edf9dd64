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

Why `deploy` rewrites nothing: with the token FF's weights on the left of the tokens, LiteRT's converter makes more
transposes (`weight @ x`), or fewer, but BATCH_MATMUL in place of FULLY_CONNECTED (`torch.bmm`). Neither is faster.

Shapes: B batch, C channels, H W image, N tokens, D embedding, F hidden width of every FF, K classes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from host.models.checks import require_images, require_patches
from host.models.deploy import inference_copy
from host.models.entry import ModelEntry

FIELD_DROPOUT = 0.1
"""Of the small models: the paper's 0.5 leaves little of 192 hidden units."""


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


class TokenFeedForward(FeedForward):
    """FF along the token axis, shared over the channels: [B, N, D] to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """One MLP-Mixer block, [B, N, D] to the same shape: a FF along the tokens, then one along the channels.

    Source: Tolstikhin et al. 2021, arXiv:2105.01601; the inner network of NiNformer.
    """

    def __init__(self, *, num_tokens: int, embed_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(embed_dim)
        self.token_ff = TokenFeedForward(num_tokens, hidden_dim, dropout)
        self.channel_norm = nn.LayerNorm(embed_dim)
        self.channel_ff = FeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_ff(self.token_norm(x))
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
        self.ff_norm = None if shared_norm else nn.LayerNorm(embed_dim)  # None: `norm` again
        self.unit = unit
        self.ff = FeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.unit(self.norm(x))
        return x + self.ff((self.ff_norm or self.norm)(x))


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
        ModelError: the size cannot be cut into patches, or images of another shape arrive.
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
        require_patches(image_size, patch_size)
        self.image_size, self.in_chans = image_size, in_chans
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
        require_images(self, images_nchw)
        return self.patch_embed(images_nchw).flatten(2).transpose(1, 2)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, D], the mean over the tokens of the last block."""
        return self.blocks(self.embed(images_nchw)).mean(dim=1)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> "NiNformer":
        """A copy for inference and export, in evaluation mode, without dropout."""
        return inference_copy(self)


def cifar10(*, num_classes: int = 10, in_chans: int = 3, **options: Any) -> NiNformer:
    """`cifar10`, the one configuration in the authors' code: 2,652,170 parameters, 218.9 million MACs."""
    return NiNformer(num_classes=num_classes, in_chans=in_chans, **options)


def cifar100(*, num_classes: int = 100, in_chans: int = 3, **options: Any) -> NiNformer:
    """`cifar100`, the same with 100 classes: 2,675,300 parameters."""
    return NiNformer(num_classes=num_classes, in_chans=in_chans, **options)


def mnist(*, num_classes: int = 10, in_chans: int = 1, **options: Any) -> NiNformer:
    """`mnist`, the same for 28 x 28 grey images, 49 tokens: 2,582,478 parameters. The geometry is our assumption."""
    return NiNformer(num_classes=num_classes, in_chans=in_chans, **{"image_size": 28, **options})


_FIELD: dict[str, Any] = {"embed_dim": 128, "hidden_dim": 192, "depth": 3, "dropout": FIELD_DROPOUT}


def field_32(*, num_classes: int, in_chans: int, **options: Any) -> NiNformer:
    """`field-32`, ours: 32-pixel images, D 128 and F 192 instead of 256 and 512, 3 blocks, dropout 0.1."""
    return NiNformer(num_classes=num_classes, in_chans=in_chans, **{**_FIELD, **options})


def field_64(*, num_classes: int, in_chans: int, **options: Any) -> NiNformer:
    """`field-64`, ours: 64-pixel images in patches of 8, else as `field_32`."""
    layout = {"image_size": 64, "patch_size": 8, **_FIELD}
    return NiNformer(num_classes=num_classes, in_chans=in_chans, **{**layout, **options})


def _entry(build: Callable[..., NiNformer], image_size: int, summary: str, **facts: int) -> ModelEntry:
    variant = build.__name__.replace("_", "-")
    return ModelEntry(
        family="ninformer",
        variant=variant,
        build=build,
        image_size=image_size,
        summary=summary,
        paper="arXiv:2403.02411",
        is_exact=not variant.startswith("field"),
        **facts,
    )


ENTRIES: tuple[ModelEntry, ...] = (
    _entry(cifar10, 32, "4 blocks of D 256 on 64 tokens", num_classes=10, parameters=2_652_170, macs=218_892_800),
    _entry(
        cifar100,
        32,
        "the same with 100 classes; no code of the paper's fixes it",
        num_classes=100,
        parameters=2_675_300,
        macs=218_915_840,
    ),
    _entry(
        mnist,
        28,
        "the same on 49 tokens of grey images; the geometry is our assumption",
        num_classes=10,
        in_chans=1,
        parameters=2_582_478,
        macs=167_188_992,
    ),
    _entry(
        field_32, 32, "ours: 3 blocks of D 128 for 32-pixel images", num_classes=10, parameters=430_730, macs=31_851_776
    ),
    _entry(
        field_64,
        64,
        "ours: 3 blocks of D 128 for 64-pixel images",
        num_classes=100,
        parameters=460_772,
        macs=33_042_944,
    ),
)
