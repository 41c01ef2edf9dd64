"""DeiT: a plain vision transformer with an optional distillation token, in blocks that may each have their own widths.

Touvron et al. 2021, arXiv:2012.12877; timm's names and layouts, so that its weights load. Structural pruning (NViT,
Yang et al. 2023, arXiv:2110.04869) leaves a block with fewer heads, narrower queries and keys, narrower values and a
narrower MLP than its neighbours (`vit_widths`).

Where we differ:
- Widths are given per block, and the softmax scale with the model: it stays that of the head before pruning, 64^-0.5,
  whatever width of queries and keys remains.
- `forward_features` of a distilled model is [z_CLS ; z_DIST], because the mean of two heads on two tokens is one linear
  head on both, and not on their mean (DeiT-LT, Rangwani et al. 2024, arXiv:2404.02900).
- The last norm reads those one or two tokens only.
- The class token starts like every other weight, with a standard deviation of 0.02; timm's starts at 1e-6.

D is one for all blocks. Removing a channel of it is more than zeroing it: a LayerNorm counts the zeros, so a masked
model and the narrow one differ there, while they are equal in every width of `BlockWidths`.

The inference form keeps its tokens in rows [N B, D], the token before the image. Then every layer is a plain matrix
product; the rows split into [B heads, N, QK] without a fourth axis; and the first rows are the class tokens, all that
the last block has to compute. In every other form that we tried, litert-torch takes q k^T of a single head for a fully
connected layer with computed weights, which XNNPACK refuses. Norms keep their scale and shift: folding them into the
next layer saves no operation in either format.

Shapes: B batch, C channels, H W image, N tokens, P = 1 or 2 of them in front of the patches, D embedding, K classes.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Self

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError
from host.models.checks import require_drop_path, require_images, require_patches
from host.models.deploy import inference_copy, make_linear
from host.models.entry import ModelEntry
from host.models.heads import TIMM_HEADS, TokenHeads, renamed
from host.models.vit_widths import HEAD_DIM, BlockWidths, revit_widths, uniform_widths

NORM_EPS = 1e-6
INIT_STD = 0.02
_PAPER = "arXiv:2012.12877"


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] to the same shape.

    `qkv` computes the queries of all heads, then the keys, then the values; with equal widths that is timm's layout.
    """

    def __init__(self, embed_dim: int, widths: BlockWidths, softmax_scale: float) -> None:
        super().__init__()
        self.widths = widths
        self.softmax_scale = softmax_scale
        self.qkv = nn.Linear(embed_dim, sum(widths.qkv_dims))
        self.proj = nn.Linear(widths.qkv_dims[2], embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.widths.qkv_dims, dim=2)
        q, k, v = (x.unflatten(2, (self.widths.num_heads, -1)).transpose(1, 2) for x in parts)  # [B, heads, N, QK or V]
        weights = (q * self.softmax_scale @ k.transpose(2, 3)).softmax(dim=-1)  # [B, heads, N, N]
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU (erf), linear: [B, N, D] to the same shape."""

    def __init__(self, embed_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual: [B, N, D] to the same shape."""

    def __init__(self, embed_dim: int, widths: BlockWidths, softmax_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attn = Attention(embed_dim, widths, softmax_scale)
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.mlp = Mlp(embed_dim, widths.mlp_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to patches [B, N - P, D], row by row."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.proj(images_nchw).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Images [B, C, H, W] to features [B, P D] and logits [B, K]; H = W = `image_size`.

    Args:
        num_classes: K.
        in_chans: C.
        image_size: a multiple of `patch_size`.
        patch_size: side of a patch.
        embed_dim: D.
        widths: of each block; there are as many blocks.
        softmax_scale: what queries times keys are multiplied by, in every block. Pruning must hand it on unchanged.
        is_distilled: whether a distillation token follows the class token.
        drop_path: probability of dropping a branch of the last block, falling to 0 at the first.

    Raises:
        ModelError: the image cannot be cut into patches, there is no block or no channel, the scale is not positive,
            `drop_path` is not in [0, 1), or images of another shape arrive.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        widths: Iterable[BlockWidths],
        softmax_scale: float = HEAD_DIM**-0.5,
        is_distilled: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        _require_layout(image_size, patch_size, embed_dim, len(self.widths))
        _require_scale(softmax_scale)
        require_drop_path(drop_path)
        self.image_size, self.patch_size, self.in_chans = image_size, patch_size, in_chans
        self.embed_dim = embed_dim
        self.softmax_scale = softmax_scale
        self.is_distilled = is_distilled
        self.drop_path = drop_path
        self.num_prefix_tokens = 2 if is_distilled else 1
        self.feature_dim = self.num_prefix_tokens * embed_dim
        num_tokens = self.num_prefix_tokens + (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if is_distilled else None
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        rates = torch.linspace(0, drop_path, len(self.widths), device="cpu").tolist()
        self.blocks = nn.Sequential(
            *(Block(embed_dim, width, softmax_scale, rate) for width, rate in zip(self.widths, rates, strict=True))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head = (TokenHeads if is_distilled else nn.Linear)(embed_dim, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        for tokens in (self.cls_token, self.dist_token, self.pos_embed):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=INIT_STD)

    @property
    def prefix_tokens(self) -> Tensor:
        """CLS, or CLS and DIST: [1, P, D]."""
        return self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], dim=1)

    def embed(self, images_nchw: Tensor) -> Tensor:
        """Tokens [B, N, D] with their positions: CLS, DIST if distilled, patches row by row."""
        require_images(self, images_nchw)
        prefix = self.prefix_tokens.expand(len(images_nchw), -1, -1)
        return torch.cat([prefix, self.patch_embed(images_nchw)], dim=1) + self.pos_embed

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, P D]: z_CLS, or [z_CLS ; z_DIST]."""
        tokens = self.blocks(self.embed(images_nchw))  # [B, N, D]
        return self.norm(tokens[:, : self.num_prefix_tokens]).flatten(1)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> "InferenceTransformer":
        """The inference form, with the scale in the queries' weights, the first tokens as constants and one head."""
        return InferenceTransformer(inference_copy(self)).eval().requires_grad_(False)


class InferenceAttention(nn.Module):
    """`Attention` of the first M of N tokens to all of them, in rows: [M B, D] and [N B, D] to [M B, D].

    Queries, keys and values have a layer each, and the softmax scale is in the weights of the first.
    """

    def __init__(self, attention: Attention, num_tokens: int, num_queries: int) -> None:
        super().__init__()
        self.widths = attention.widths
        self.num_tokens, self.num_queries = num_tokens, num_queries
        weights, biases = (part.split(self.widths.qkv_dims) for part in (attention.qkv.weight, attention.qkv.bias))
        self.q = make_linear(weights[0] * attention.softmax_scale, biases[0] * attention.softmax_scale)
        self.k, self.v = make_linear(weights[1], biases[1]), make_linear(weights[2], biases[2])
        self.proj = attention.proj

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        q = self.q(queries).reshape(self.num_queries, -1, self.widths.qk_dim).transpose(0, 1)  # [B heads, M, QK]
        k = self.k(x).reshape(self.num_tokens, -1, self.widths.qk_dim).permute(1, 2, 0)  # [B heads, QK, N]
        v = self.v(x).reshape(self.num_tokens, -1, self.widths.v_dim).transpose(0, 1)  # [B heads, N, V]
        outputs = torch.bmm(torch.bmm(q, k).softmax(dim=-1), v)  # [B heads, M, V]
        return self.proj(outputs.transpose(0, 1).reshape(-1, self.proj.in_features))


class InferenceBlock(nn.Module):
    """`Block` that gives the first M of N tokens: rows [N B, D] to [M B, D]."""

    def __init__(self, block: Block, num_tokens: int, num_queries: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = InferenceAttention(block.attn, num_tokens, num_queries)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self._first(x) + self.attn(self._first(normed), normed)
        return x + self.mlp(self.norm2(x))

    def _first(self, x: Tensor) -> Tensor:
        num_tokens, num_queries = self.attn.num_tokens, self.attn.num_queries
        return x if num_queries == num_tokens else x[: len(x) // num_tokens * num_queries]


class InferenceTransformer(nn.Module):
    """`VisionTransformer` for inference and export, with the same outputs.

    Args:
        model: in evaluation mode and without gradients; its layers are taken over.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.image_size, self.in_chans, self.feature_dim = model.image_size, model.in_chans, model.feature_dim
        self.num_prefix_tokens = model.num_prefix_tokens
        positions = model.pos_embed.transpose(0, 1)  # [N, 1, D]
        num_tokens, num_prefix = len(positions), model.num_prefix_tokens
        self.register_buffer("prefix", model.prefix_tokens.transpose(0, 1) + positions[:num_prefix])  # [P, 1, D]
        self.register_buffer("patch_positions", positions[num_prefix:].clone())  # [N - P, 1, D]
        self.patch_embed = model.patch_embed.proj
        *blocks, last = model.blocks
        self.blocks = nn.Sequential(
            *(InferenceBlock(block, num_tokens, num_tokens) for block in blocks),
            InferenceBlock(last, num_tokens, num_prefix),
        )
        self.norm = model.norm
        self.head = model.head.merged() if model.is_distilled else model.head

    def embed(self, images_nchw: Tensor) -> Tensor:
        """Tokens in rows [N B, D]."""
        require_images(self, images_nchw)
        patches = self.patch_embed(images_nchw).permute(0, 2, 3, 1).flatten(1, 2).transpose(0, 1)  # [N - P, B, D]
        prefix = self.prefix.expand(-1, len(images_nchw), -1)
        return torch.cat([prefix, patches + self.patch_positions]).flatten(0, 1)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, P D]: z_CLS, or [z_CLS ; z_DIST]."""
        tokens = self.norm(self.blocks(self.embed(images_nchw)))  # [P B, D]
        return tokens.unflatten(0, (self.num_prefix_tokens, -1)).transpose(0, 1).flatten(1)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> Self:
        """A copy: this is the inference form."""
        return inference_copy(self)


def deit(*, num_heads: int, num_classes: int, in_chans: int, **options: Any) -> VisionTransformer:
    """A DeiT for 224-pixel images: 12 blocks, patch 16, heads of 64, D = 64 `num_heads`, an MLP of 4 D.

    Tiny has 3 heads, small 6, base 12; `is_distilled` adds the distillation token. The paper's `drop_path` is 0.1.
    """
    embed_dim = HEAD_DIM * num_heads
    layout = {
        "image_size": 224,
        "patch_size": 16,
        "embed_dim": embed_dim,
        "widths": uniform_widths(12, num_heads, HEAD_DIM, 4 * embed_dim),
    }
    return VisionTransformer(num_classes=num_classes, in_chans=in_chans, **{**layout, **options})


def field_32(*, num_classes: int, in_chans: int, **options: Any) -> VisionTransformer:
    """`field-32`, ours and not the paper's: 32-pixel images in patches of 4, 6 blocks of D 128.

    Against DeiT-tiny: 4 heads of 32 instead of 3 of 64, with the softmax scale of that width; an MLP of 2 D instead of
    4 D; half the blocks; 64 patches instead of 196; 0.8 instead of 5.7 million parameters.
    """
    return _field(32, 4, num_classes=num_classes, in_chans=in_chans, **options)


def field_64(*, num_classes: int, in_chans: int, **options: Any) -> VisionTransformer:
    """`field-64`, ours: 64-pixel images in patches of 8, else as `field_32`."""
    return _field(64, 8, num_classes=num_classes, in_chans=in_chans, **options)


def _field(image_size: int, patch_size: int, /, **options: Any) -> VisionTransformer:
    head_dim = 32
    layout = {
        "image_size": image_size,
        "patch_size": patch_size,
        "embed_dim": 128,
        "widths": uniform_widths(6, 4, head_dim, 256),
        "softmax_scale": head_dim**-0.5,
    }
    return VisionTransformer(**{**layout, **options})


def revit(
    *, embed_dim: int, num_classes: int, in_chans: int, depth: int = 12, rule: str = "paper", **options: Any
) -> VisionTransformer:
    """A ReViT for 224-pixel images, distilled and with the softmax scale of heads of 64, as in the authors' code.

    ReViT-S has D 384, ReViT-T 176.
    """
    settings = {"image_size": 224, "patch_size": 16, "is_distilled": True, **options}
    widths = revit_widths(embed_dim, depth=depth, rule=rule)
    return VisionTransformer(num_classes=num_classes, in_chans=in_chans, embed_dim=embed_dim, widths=widths, **settings)


def _require_layout(image_size: int, patch_size: int, embed_dim: int, depth: int) -> None:
    require_patches(image_size, patch_size)
    if embed_dim < 1 or depth < 1:
        raise ModelError(f"embed_dim and the number of blocks must be 1 or more, got {embed_dim} and {depth}")


def _require_scale(softmax_scale: float) -> None:
    if not 0 < softmax_scale < math.inf:
        raise ModelError(f"softmax_scale must be positive, got {softmax_scale}")


def _published(variant: str, num_heads: int, parameters: int, macs: int, *, is_distilled: bool = False) -> ModelEntry:
    name = f"{variant}-distilled" if is_distilled else variant
    return ModelEntry(
        family="deit",
        variant=name,
        build=partial(deit, num_heads=num_heads, is_distilled=is_distilled),
        image_size=224,
        summary=f"DeiT-{variant}{' with a distillation token' if is_distilled else ''}; 12 blocks of {num_heads} heads",
        paper=_PAPER,
        parameters=parameters,
        macs=macs,
        is_exact=True,
        timm_name=f"deit_{name.replace('-', '_')}_patch16_224",
        from_timm=partial(renamed, prefixes=TIMM_HEADS if is_distilled else {}),
    )


_field_entry = partial(ModelEntry, family="deit", paper=_PAPER, is_exact=False)

ENTRIES: tuple[ModelEntry, ...] = (
    _published("tiny", 3, 5_717_416, 1_253_683_200),
    _published("small", 6, 22_050_664, 4_598_882_304),
    _published("base", 12, 86_567_656, 17_563_828_224),
    _published("tiny", 3, 5_910_800, 1_261_003_776, is_distilled=True),
    _published("small", 6, 22_436_432, 4_624_140_288, is_distilled=True),
    _published("base", 12, 87_338_192, 17_656_811_520, is_distilled=True),
    _field_entry(
        variant="field-32",
        build=field_32,
        image_size=32,
        summary="our small DeiT for 32-pixel images; 6 blocks of 4 heads, 64 patches",
        parameters=811_146,
        macs=58_002_176,
        num_classes=10,
    ),
    _field_entry(
        variant="field-64",
        build=field_64,
        image_size=64,
        summary="our small DeiT for 64-pixel images; 6 blocks of 4 heads, 64 patches",
        parameters=841_188,
        macs=59_193_344,
        num_classes=100,
    ),
)
