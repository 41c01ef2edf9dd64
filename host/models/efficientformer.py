"""EfficientFormer: convolutions and pooling first, then attention on tokens, with features taken at several depths.

Li et al. 2022, arXiv:2206.01191; blocks are timm's, and so are the names in the state dict.

Where we differ:
- Features are concatenated from several stages, each pooled to a grid (`tap_grids`) and normalized. New classes are
  learned from frozen features on a board, and early, still local features tell apart what the last stage was never
  asked to.
- The grid of the attention bias is a parameter; timm fixes it to 7 x 7, that is to 224-pixel images.
- In evaluation mode the attention bias is a buffer, gathered once, so that an exported graph holds no gather.
- One head; the paper's distillation head is averaged into it before export anyway.
- `layer_scale` starts at 0.1 in our small variant. The paper's 1e-5 needs many epochs to open the blocks.
"""

from typing import Any

import torch
from timm.models.efficientformer import Attention, EfficientFormerStage, MetaBlock1d, Stem4
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError

STEM_STRIDE = 4


class GridAttention(Attention):
    """timm's attention; the bias [heads, N, N] is gathered on entering evaluation mode and on loading weights."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.register_buffer("bias_map", self._gather(), persistent=False)

    def train(self, mode: bool = True) -> "GridAttention":
        super().train(mode)
        if not mode:
            self.bias_map = self._gather()
        return self

    def get_attention_biases(self, device: torch.device) -> Tensor:
        return self.attention_biases[:, self.attention_bias_idxs] if self.training else self.bias_map

    def _gather(self) -> Tensor:
        return self.attention_biases.detach()[:, self.attention_bias_idxs]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.bias_map = self._gather()


class EfficientFormer(nn.Module):
    """Images [B, C, H, W] to features [B, D] and logits [B, K]; H = W = `image_size`.

    Args:
        image_size: a multiple of 4 * 2 ** (stages - 1).
        widths: channels of each stage.
        depths: blocks of each stage.
        num_vit: how many of the last stage's blocks are attention blocks, at least 1.
        tap_grids: per stage, the side of the grid that its features are averaged to; 0 takes none. The last stage is
            made of tokens by then, and takes 0 or 1.
        num_heads, key_dim, attn_ratio: attention heads, width of query and key per head, value width / key width.
        layer_scale: where the layer scale of every block starts.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_chans: int,
        num_classes: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        num_vit: int,
        tap_grids: tuple[int, ...],
        num_heads: int = 8,
        key_dim: int = 32,
        attn_ratio: float = 4,
        layer_scale: float = 1e-5,
    ) -> None:
        super().__init__()
        sizes = [image_size // (STEM_STRIDE * 2**index) for index in range(len(widths))]
        _require_layout(image_size, sizes, depths, num_vit, tap_grids)
        self.image_size = image_size
        self.tap_grids = tap_grids
        self.tap_kernels = [size // max(grid, 1) for size, grid in zip(sizes, tap_grids, strict=True)]
        self.stem = Stem4(in_chans, widths[0])
        self.stages = _make_stages(widths, depths, num_vit, layer_scale)
        for block in self.stages[-1].blocks:
            if isinstance(block, MetaBlock1d):
                block.token_mixer = GridAttention(
                    widths[-1], key_dim=key_dim, num_heads=num_heads, attn_ratio=attn_ratio, resolution=sizes[-1]
                )
        self.norm = nn.LayerNorm(widths[-1])
        dims = [width * grid**2 for width, grid in zip(widths, tap_grids, strict=True)]
        self.tap_norms = nn.ModuleList(nn.BatchNorm1d(dim, affine=False) if dim else nn.Identity() for dim in dims)
        self.feature_dim = sum(dims)
        self.head = nn.Linear(self.feature_dim, num_classes)
        self.apply(_initialize)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Normalized features [B, D], the taps one after another."""
        x = self.stem(images_nchw)  # [B, C1, H / 4, W / 4]
        taps = []
        for stage, grid, kernel, norm in zip(
            self.stages, self.tap_grids, self.tap_kernels, self.tap_norms, strict=True
        ):
            x = stage(x)  # [B, C, h, w]; tokens [B, N, C] after the last
            if grid:
                taps.append(norm(self.norm(x).mean(dim=1) if x.ndim == 3 else _pool(x, grid, kernel)))
        return torch.cat(taps, dim=1)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]


def field_32(*, num_classes: int, in_chans: int) -> EfficientFormer:
    """`field-32`, ours and not the paper's: two stages at 8 x 8 and 4 x 4 for 32-pixel images, one attention block.

    Against EfficientFormer-L1: 0.36 million parameters instead of 12, 4 heads instead of 8 with half as wide keys, a
    4 x 4 instead of a 7 x 7 attention grid, and 256 features: stage 1 averaged to 2 x 2, stage 2 to one vector.
    """
    return EfficientFormer(
        image_size=32,
        in_chans=in_chans,
        num_classes=num_classes,
        widths=(40, 96),
        depths=(2, 3),
        num_vit=1,
        tap_grids=(2, 1),
        num_heads=4,
        key_dim=16,
        layer_scale=0.1,
    )


def _make_stages(widths: tuple[int, ...], depths: tuple[int, ...], num_vit: int, layer_scale: float) -> nn.Sequential:
    last = len(widths) - 1
    return nn.Sequential(
        *(
            EfficientFormerStage(
                widths[max(index - 1, 0)],
                width,
                depth,
                downsample=index > 0,
                num_vit=num_vit if index == last else 0,
                drop_path=[0.0] * depth,
                layer_scale_init_value=layer_scale,
            )
            for index, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
    )


def _pool(x: Tensor, grid: int, kernel: int) -> Tensor:
    return x.mean(dim=(2, 3)) if grid == 1 else F.avg_pool2d(x, kernel).flatten(1)  # [B, C * grid ** 2]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _require_layout(
    image_size: int, sizes: list[int], depths: tuple[int, ...], num_vit: int, tap_grids: tuple[int, ...]
) -> None:
    if not len(sizes) == len(depths) == len(tap_grids):
        raise ModelError(f"depths {depths}, tap_grids {tap_grids} need {len(sizes)} values, one per stage")
    stride = STEM_STRIDE * 2 ** (len(sizes) - 1)
    if image_size < stride or image_size % stride:
        raise ModelError(f"image_size must be a multiple of {stride}, got {image_size}")
    if not 1 <= num_vit <= depths[-1]:
        raise ModelError(f"num_vit must be 1..{depths[-1]}, the depth of the last stage, got {num_vit}")
    if any(grid and size % grid for size, grid in zip(sizes, tap_grids, strict=True)):
        raise ModelError(f"tap_grids {tap_grids} must divide the stages' sizes {tuple(sizes)}")
    if tap_grids[-1] not in (0, 1) or not any(tap_grids):
        raise ModelError(f"tap_grids must end in 0 or 1 and take at least one stage, got {tap_grids}")
