"""EfficientFormer: convolutions and pooling first, then attention on tokens; features may be taken at several depths.

Li et al. 2022, arXiv:2206.01191; blocks are timm's, and so are the names in the state dict. The paper's text writes the
pooling mixer as Pool(X) + X; the authors' code and timm compute X + gamma * (Pool(X) - X), and so do we.

Where we differ:
- The grid of the attention bias follows `image_size`; timm fixes it to 7 x 7, that is to 224-pixel images.
- The attention bias is gathered at every call; timm keeps it between calls. In the inference form it is a constant.
- In the inference form the queries' weights hold the softmax scale: float16 ends at 65504, and a product is spared.
- The 1 x 1 convolutions of the published variants start from N(0, 0.02), as in the authors' code and not in timm's.
- Our small variants take features from several stages (`tap_grids`), each pooled to a grid and normalized. New classes
  are learned from frozen features on a board, and early, still local features tell apart what the last stage was never
  asked to. They have one head, and `layer_scale` starts at 0.1: the paper's 1e-5 needs many epochs to open the blocks.

`deploy` also folds each layer scale into the linear map before it (BN, W2, projection), except the one after the
pooling, which has none. The pooling stays an average pooling that does not count the padding: TFLite's SAME average
pooling is just that, and Core ML has a flag for it. A depthwise convolution filled with 1/9 would be wrong at the edge.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import torch
from timm.layers import calculate_drop_path_rates
from timm.models.efficientformer import Attention, EfficientFormerStage, MetaBlock1d, MetaBlock2d, Stem4
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError
from host.models.checks import require_drop_path, require_images, require_multiple
from host.models.deploy import fold_batch_norms, inference_copy, replace_modules
from host.models.entry import ModelEntry, StateDict
from host.models.heads import TIMM_HEADS, DistillationHeads, renamed

PAPER = "arXiv:2206.01191"
STEM_STRIDE = 4


class GridAttention(Attention):
    """timm's attention on a grid of any size; gathers its bias at every call, so that gradients reach the table."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        return self  # timm's returns nothing

    def get_attention_biases(self, device: torch.device) -> Tensor:
        return self.attention_biases[:, self.attention_bias_idxs]  # [heads, N, N]


class FixedGridAttention(nn.Module):
    """The inference form of `GridAttention`, whose layers it takes over: [B, N, D] to the same shape."""

    def __init__(self, attention: GridAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.widths = [attention.key_dim, attention.key_dim, attention.val_dim]
        self.qkv, self.proj = attention.qkv, attention.proj
        factors = torch.ones(self.num_heads, sum(self.widths)).to(self.qkv.weight)
        factors[:, : attention.key_dim] = attention.scale
        scale_outputs(self.qkv, factors.flatten())
        bias = attention.attention_biases.detach()[:, attention.attention_bias_idxs]
        self.register_buffer("bias_map", bias)  # [heads, N, N]

    def forward(self, x: Tensor) -> Tensor:
        batch, num_tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.split(self.widths, dim=3)  # [B, heads, N, width]
        weights = (q @ k.transpose(2, 3) + self.bias_map).softmax(dim=-1)  # [B, heads, N, N]
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, num_tokens, -1))


class EfficientFormer(nn.Module):
    """Images [B, C, H, W] to features [B, D] and logits [B, K]; H = W = `image_size`.

    Args:
        image_size: a multiple of 4 * 2 ** (stages - 1).
        widths: channels of each stage.
        depths: blocks of each stage.
        num_vit: how many of the last stage's blocks are attention blocks, at least 1.
        tap_grids: per stage, the side of the grid that its features are averaged to; 0 takes none. The last stage is
            made of tokens by then, and takes 0 or 1. None: the mean of the last stage's tokens, as in the paper; taps
            are normalized per feature, and it is not.
        num_heads, key_dim, attn_ratio: attention heads, width of query and key per head, value width / key width.
        layer_scale: where the layer scale of every block starts.
        drop_path: stochastic depth of the last block; it grows from 0 at the first one.
        distilled: whether a second head follows a teacher.

    Raises:
        ModelError: no such layout, or images of another shape arrive.
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
        tap_grids: tuple[int, ...] | None = None,
        num_heads: int = 8,
        key_dim: int = 32,
        attn_ratio: float = 4,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        sizes = [image_size // (STEM_STRIDE * 2**index) for index in range(len(widths))]
        grids = (0,) * (len(widths) - 1) + (1,) if tap_grids is None else tap_grids
        _require_layout(image_size, sizes, depths, num_vit, grids)
        require_drop_path(drop_path)
        self.image_size, self.in_chans = image_size, in_chans
        self.tap_grids = grids
        self.tap_kernels = [size // max(grid, 1) for size, grid in zip(sizes, grids, strict=True)]
        self.stem = Stem4(in_chans, widths[0])
        self.stages = _make_stages(widths, depths, num_vit, layer_scale, drop_path)
        for block in self.stages[-1].blocks:
            if isinstance(block, MetaBlock1d):
                block.token_mixer = GridAttention(
                    widths[-1], key_dim=key_dim, num_heads=num_heads, attn_ratio=attn_ratio, resolution=sizes[-1]
                )
        self.norm = nn.LayerNorm(widths[-1])
        dims = [width * grid**2 for width, grid in zip(widths, grids, strict=True)]
        self.tap_norms = nn.ModuleList(
            nn.BatchNorm1d(dim, affine=False) if dim and tap_grids else nn.Identity() for dim in dims
        )
        self.feature_dim = sum(dims)
        self.head = (DistillationHeads if distilled else nn.Linear)(self.feature_dim, num_classes)
        self.apply(_initialize)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, D], the taps one after another."""
        require_images(self, images_nchw)
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

    def deploy(self) -> Self:
        """The inference form: batch norms and layer scales folded, the attention bias gathered, one linear head."""
        model = inference_copy(self)
        if isinstance(model.head, DistillationHeads):
            model.head = model.head.merged()
        _fold_layer_scales(model)
        replace_modules(model, GridAttention, FixedGridAttention)
        fold_batch_norms(model)
        return model


def l1(*, num_classes: int, in_chans: int, **options: Any) -> EfficientFormer:
    """EfficientFormer-L1, 12.3 million parameters."""
    layout = {"widths": (48, 96, 224, 448), "depths": (3, 2, 6, 4), "num_vit": 1}
    return _published(num_classes, in_chans, **{**layout, **options})


def l3(*, num_classes: int, in_chans: int, **options: Any) -> EfficientFormer:
    """EfficientFormer-L3, 31.4 million parameters."""
    layout = {"widths": (64, 128, 320, 512), "depths": (4, 4, 12, 6), "num_vit": 4}
    return _published(num_classes, in_chans, **{**layout, **options})


def l7(*, num_classes: int, in_chans: int, **options: Any) -> EfficientFormer:
    """EfficientFormer-L7, 82.2 million parameters; its last stage has attention blocks only."""
    layout = {"widths": (96, 192, 384, 768), "depths": (6, 6, 18, 8), "num_vit": 8}
    return _published(num_classes, in_chans, **{**layout, **options})


def field_32(*, num_classes: int, in_chans: int, **options: Any) -> EfficientFormer:
    """`field-32`, ours and not the paper's: two stages at 8 x 8 and 4 x 4 for 32-pixel images, one attention block.

    Against EfficientFormer-L1: 0.36 million parameters instead of 12, 4 heads instead of 8 with half as wide keys, a
    4 x 4 instead of a 7 x 7 attention grid, and 256 features: stage 1 averaged to 2 x 2, stage 2 to one vector.
    """
    layout = {"image_size": 32, "widths": (40, 96), "depths": (2, 3), "num_vit": 1, "tap_grids": (2, 1)}
    settings = {"num_heads": 4, "key_dim": 16, "layer_scale": 0.1}
    return EfficientFormer(in_chans=in_chans, num_classes=num_classes, **{**layout, **settings, **options})


def field_64(*, num_classes: int, in_chans: int, **options: Any) -> EfficientFormer:
    """`field-64`, ours and not the paper's: three stages at 16 x 16, 8 x 8 and 4 x 4 for 64-pixel images.

    Against EfficientFormer-L1: 1.3 million parameters instead of 12, 4 heads instead of 8 with half as wide keys, a
    4 x 4 instead of a 7 x 7 attention grid, and 304 features, the mean of every stage.
    """
    layout = {"image_size": 64, "widths": (48, 96, 160), "depths": (2, 2, 4), "num_vit": 1, "tap_grids": (1, 1, 1)}
    settings = {"num_heads": 4, "key_dim": 16, "layer_scale": 0.1}
    return EfficientFormer(in_chans=in_chans, num_classes=num_classes, **{**layout, **settings, **options})


def from_timm(state: StateDict) -> dict[str, Tensor]:
    """Give timm's weights the names of a model with both heads; only the heads' differ."""
    return renamed(state, TIMM_HEADS)


def scale_outputs(layer: nn.Module, factors: Tensor | float) -> None:
    """Multiply the outputs of a linear layer, convolution or affine norm, by scaling its weight and bias in place.

    Args:
        layer: has a weight [O, ...] and a bias [O].
        factors: one factor, or [O].
    """
    with torch.no_grad():
        factors = torch.as_tensor(factors, dtype=layer.weight.dtype).expand(len(layer.weight))
        layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.mul_(factors)


def fold_layer_scale(block: nn.Module, name: str, layer: nn.Module) -> None:
    """Fold the layer scale `name` of a block into the layer before it, unless that was done before."""
    scale = getattr(block, name)
    if not isinstance(scale, nn.Identity):
        scale_outputs(layer, scale.gamma)
        setattr(block, name, nn.Identity())


def _published(num_classes: int, in_chans: int, **layout: Any) -> EfficientFormer:
    options = {"image_size": 224, "distilled": True, **layout}
    model = EfficientFormer(in_chans=in_chans, num_classes=num_classes, **options)
    for block in _blocks(model, MetaBlock2d):
        _truncated_normal(block.mlp.fc1)
        _truncated_normal(block.mlp.fc2)
    return model


def _make_stages(
    widths: tuple[int, ...], depths: tuple[int, ...], num_vit: int, layer_scale: float, drop_path: float
) -> nn.Sequential:
    last = len(widths) - 1
    rates = calculate_drop_path_rates(drop_path, depths, stagewise=True)
    return nn.Sequential(
        *(
            EfficientFormerStage(
                widths[max(index - 1, 0)],
                width,
                depth,
                downsample=index > 0,
                num_vit=num_vit if index == last else 0,
                drop_path=rates[index],
                layer_scale_init_value=layer_scale,
            )
            for index, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
    )


def _blocks(model: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, kind))


def _fold_layer_scales(model: EfficientFormer) -> None:
    for block in _blocks(model, MetaBlock2d):
        fold_layer_scale(block, "ls2", block.mlp.norm2)
    for block in _blocks(model, MetaBlock1d):
        fold_layer_scale(block, "ls1", block.token_mixer.proj)
        fold_layer_scale(block, "ls2", block.mlp.fc2)


def _pool(x: Tensor, grid: int, kernel: int) -> Tensor:
    return x.mean(dim=(2, 3)) if grid == 1 else F.avg_pool2d(x, kernel).flatten(1)  # [B, C * grid ** 2]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        _truncated_normal(module)


def _truncated_normal(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def _require_layout(
    image_size: int, sizes: list[int], depths: tuple[int, ...], num_vit: int, tap_grids: tuple[int, ...]
) -> None:
    if not len(sizes) == len(depths) == len(tap_grids):
        raise ModelError(f"depths {depths}, tap_grids {tap_grids} need {len(sizes)} values, one per stage")
    require_multiple(image_size, STEM_STRIDE * 2 ** (len(sizes) - 1), "the stride of the last stage")
    if not 1 <= num_vit <= depths[-1]:
        raise ModelError(f"num_vit must be 1..{depths[-1]}, the depth of the last stage, got {num_vit}")
    if any(grid and size % grid for size, grid in zip(sizes, tap_grids, strict=True)):
        raise ModelError(f"tap_grids {tap_grids} must divide the stages' sizes {tuple(sizes)}")
    if tap_grids[-1] not in (0, 1) or not any(tap_grids):
        raise ModelError(f"tap_grids must end in 0 or 1 and take at least one stage, got {tap_grids}")


def _paper_entry(build: Callable[..., EfficientFormer], parameters: int, macs: int, summary: str) -> ModelEntry:
    return ModelEntry(
        family="efficientformer",
        variant=build.__name__,
        build=build,
        image_size=224,
        summary=summary,
        paper=PAPER,
        parameters=parameters,
        macs=macs,
        is_exact=True,
        timm_name=f"efficientformer_{build.__name__}",
        from_timm=from_timm,
    )


_field_entry = partial(ModelEntry, family="efficientformer", paper=PAPER, is_exact=False)

ENTRIES: tuple[ModelEntry, ...] = (
    _paper_entry(l1, 12_289_928, 1_291_284_736, "pooling in four stages, one attention block at 7 x 7"),
    _paper_entry(l3, 31_406_000, 3_906_573_312, "wider and deeper than L1, four attention blocks at 7 x 7"),
    _paper_entry(
        l7, 82_229_328, 10_119_325_696, "the largest; all eight blocks of its last stage are attention blocks"
    ),
    _field_entry(
        variant="field-32",
        build=field_32,
        image_size=32,
        summary="our small EfficientFormer for 32-pixel images; 256 features from two depths",
        parameters=359_978,
        macs=7_396_864,
        num_classes=10,
    ),
    _field_entry(
        variant="field-64",
        build=field_64,
        image_size=64,
        summary="our small EfficientFormer for 64-pixel images; 304 features from three depths",
        parameters=1_343_876,
        macs=41_916_096,
        num_classes=100,
    ),
)
