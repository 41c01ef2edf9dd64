"""Augmentation on batches of tensors: a random affine map and a smooth random displacement, resampled once.

All randomness comes from the generator that is passed in, one of the CPU, wherever the images are.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION_DEGREES = 12.0
SCALE = 0.12
SHEAR = 0.12
SHIFT = 0.1
"""Share of the image's side."""
ELASTIC = 0.06
"""Standard deviation of the displacement; 2 is the image's side."""
_ELASTIC_GRID = 4


def augment(images_nchw: Tensor, generator: torch.Generator, *, strength: float = 1.0) -> Tensor:
    """Distort images [B, C, H, W], each in its own way; what comes in at the border is the batch's darkest value.

    `strength` scales every range; at 0 the images come back as they are.
    """
    batch, _, height, width = images_nchw.shape
    background = images_nchw.amin(dim=(0, 2, 3), keepdim=True)  # [1, C, 1, 1]
    grid = F.affine_grid(_affine(batch, generator, strength), [batch, 1, height, width], align_corners=False)
    noise = torch.randn(batch, 2, _ELASTIC_GRID, _ELASTIC_GRID, generator=generator) * (ELASTIC * strength)
    smooth = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True)  # [B, 2, H, W]
    grid = (grid + smooth.permute(0, 2, 3, 1)).to(images_nchw)  # [B, H, W, 2]
    return F.grid_sample(images_nchw - background, grid, align_corners=False) + background


def quarter_turns(images_nchw: Tensor, turns: Tensor) -> Tensor:
    """Turn each square image [B, C, H, H] by `turns` [B] times 90 degrees."""
    turned = torch.stack([torch.rot90(images_nchw, k, (2, 3)) for k in range(4)])  # [4, B, C, H, H]
    return turned[turns, torch.arange(len(turns))]


def _affine(batch: int, generator: torch.Generator, strength: float) -> Tensor:
    """Random affine maps [B, 2, 3] in `affine_grid`'s coordinates, where the image's side is 2."""
    draw = strength * (2 * torch.rand(6, batch, generator=generator) - 1)  # [6, B], -strength..strength
    angle = draw[0] * math.radians(ROTATION_DEGREES)
    scale_x, scale_y = 1 + SCALE * draw[1], 1 + SCALE * draw[2]
    shear = SHEAR * draw[3]
    shift_x, shift_y = 2 * SHIFT * draw[4], 2 * SHIFT * draw[5]
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, shear * cos - sin * scale_y, shift_x], dim=1)
    row_y = torch.stack([sin * scale_x, shear * sin + cos * scale_y, shift_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)
