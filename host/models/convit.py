"""ConViT's encoder: patches, then blocks whose attention is a learned blend of content and position.

d'Ascoli et al. 2021, arXiv:2103.10697 (gated positional self-attention, GPSA). The blocks are timm's; here are the
encoder around them, as the continual transformers DyTox and GCAB use it, and its inference form.

Where we differ from timm's ConViT:
- No class token: those models read the tokens with a class-attention block of their own.
- LayerNorm's epsilon is 1e-5, as in their code; timm has 1e-6.
- In the inference form the positional softmax is a constant, computed once; the weights then sum to one by
  construction, and are not normalized again.
"""

from collections.abc import Sequence

import torch
from timm.models.convit import GPSA, Block
from torch import Tensor, nn

from host.errors import ModelError
from host.models.checks import require_patches
from host.models.deploy import make_linear, replace_modules

MLP_RATIO = 4
"""Hidden width of a block's MLP / D."""


class ConViTEncoder(nn.Module):
    """Images [B, C, H, W] to tokens [B, N, D]; H = W = `image_size`, N = (H / `patch_size`) ** 2.

    Args:
        num_heads: of 12, 9 begin with the attention of a 3 x 3 convolution.
        drop_paths: the rate of stochastic depth in each block, and by that the number of blocks.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        num_heads: int,
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        _require_layout(image_size, patch_size, embed_dim, num_heads, depth=len(drop_paths))
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=MLP_RATIO, drop_path=drop_path, norm_layer=nn.LayerNorm)
            for drop_path in drop_paths
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks.apply(initialize)
        for block in self.blocks:
            block.attn.local_init()

    def forward(self, images_nchw: Tensor) -> Tensor:
        x = self.patch_embed(images_nchw).flatten(2).transpose(1, 2) + self.pos_embed  # [B, N, D]
        for block in self.blocks:
            x = block(x)
        return x

    def fix_positions(self) -> None:
        """Change into the inference form, in place."""
        num_tokens = self.pos_embed.shape[1]
        replace_modules(self, GPSA, lambda attention: FixedPositionAttention(attention, num_tokens))


class FixedPositionAttention(nn.Module):
    """GPSA on a fixed grid: tokens [B, N, D] to [B, N, D].

    Attention is (1 - g) softmax(q k) + g softmax(positions) per head with the gate g; its second term is a constant.

    Args:
        attention: whose weights to take.
        num_tokens: N, a square.
    """

    position_map: Tensor
    content_share: Tensor

    @torch.no_grad()
    def __init__(self, attention: GPSA, num_tokens: int) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        query, key = attention.qk.weight.chunk(2)
        weight = torch.cat((query * attention.scale, key, attention.v.weight))
        self.qkv = make_linear(weight)
        self.proj = attention.proj
        gate = attention.gating_param.sigmoid().view(-1, 1, 1)  # [heads, 1, 1]
        scores = attention.pos_proj(attention.get_rel_indices(num_tokens)[0])  # [N, N, heads]
        self.register_buffer("content_share", 1 - gate)
        self.register_buffer("position_map", gate * scores.permute(2, 0, 1).softmax(dim=-1))  # [heads, N, N]

    def forward(self, x: Tensor) -> Tensor:
        batch, num_tokens, dim = x.shape
        shape = (batch, num_tokens, self.num_heads, dim // self.num_heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))  # [B, heads, N, D / h]
        attention = (q @ k.transpose(2, 3)).softmax(dim=-1) * self.content_share + self.position_map  # [B, heads, N, N]
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, num_tokens, dim))


def initialize(module: nn.Module) -> None:
    """Draw the initial weights of a linear layer; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _require_layout(image_size: int, patch_size: int, embed_dim: int, num_heads: int, *, depth: int) -> None:
    require_patches(image_size, patch_size, per_side=2)  # one patch has no neighbours to attend to
    if num_heads < 1 or embed_dim < num_heads or embed_dim % num_heads:
        raise ModelError(f"embed_dim must be a multiple of num_heads, got {embed_dim} with {num_heads} heads")
    if depth < 1:
        raise ModelError(f"depth must be 1 or more, got {depth}")
