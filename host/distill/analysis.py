"""What DeiT-LT says of its two tokens, measured: who is right about what, how far they see, how low their rank is.

Source: Rangwani et al. 2024, arXiv:2404.02900, figures. Its definitions of rank and distance are not published; ours:
- The rank of features is the number of singular values, of the centred matrix, that hold 99 % of the squared sum.
- Attention distance (Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7) is taken between the centres of patches; what
  a patch gives to CLS and DIST is left out, and the rest counts as a whole.

Shapes: n images, K classes, D embedding, N tokens, of which P = 2 are in front of the patches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from host.errors import DataError, ModelError
from host.models.deit import Attention, VisionTransformer
from host.models.deploy import inference_copy

ENERGY = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAccuracy:
    """Shares 0..1: of all images, and the mean over classes with many, some and few training images."""

    overall: float
    many: float
    medium: float
    few: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAnalysis:
    """A distilled transformer on test images.

    Attributes:
        cls, dist, average: accuracy of either head and of both.
        disagreement: share of images to which the heads give different classes.
        dist_ranks: rank of the DIST token's features after each block.
        attention_distances: of the blocks asked for, by index: mean attention distance of each head, in pixels.
    """

    cls: GroupAccuracy
    dist: GroupAccuracy
    average: GroupAccuracy
    disagreement: float
    dist_ranks: tuple[int, ...]
    attention_distances: dict[int, tuple[float, ...]]


@torch.no_grad()
def analyze_tokens(
    model: VisionTransformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    class_counts: Sequence[int],
    *,
    boundaries: tuple[int, int],
    blocks: Sequence[int] = (0, 1),
) -> TokenAnalysis:
    """Measure a distilled transformer; the tokens of all images are kept in memory until the end.

    Args:
        model: left as it is.
        batches: test images [B, C, H, W] and labels int64 [B], on the model's device; some of every class.
        class_counts: training images of each class.
        boundaries: see `group_accuracy`.
        blocks: whose attention distance is measured; the paper shows the first two.

    Raises:
        ModelError: the model has no distillation token.
        DataError: a class has no test image.
    """
    if not model.is_distilled:
        raise ModelError("this transformer has no distillation token to analyze; train one with is_distilled")
    model = inference_copy(model)
    traced = [(_trace(model, images, blocks), labels) for images, labels in batches]
    cls, dist, tokens, *distances = (
        torch.cat(parts).cpu() for parts in zip(*(trace for trace, _ in traced), strict=True)
    )
    labels = torch.cat([labels for _, labels in traced]).cpu()

    def accuracy(logits: Tensor) -> GroupAccuracy:
        return group_accuracy(logits.argmax(dim=1).numpy(), labels.numpy(), class_counts, boundaries)

    return TokenAnalysis(
        cls=accuracy(cls),
        dist=accuracy(dist),
        average=accuracy(cls + dist),
        disagreement=disagreement(cls, dist),
        dist_ranks=tuple(feature_rank(features) for features in tokens.unbind(dim=1)),
        attention_distances={
            block: tuple(per_head.mean(dim=0).tolist()) for block, per_head in zip(blocks, distances, strict=True)
        },
    )


def group_accuracy(
    predictions: np.ndarray, labels: np.ndarray, class_counts: Sequence[int], boundaries: tuple[int, int]
) -> GroupAccuracy:
    """Accuracy overall, and as a mean over the classes of each group.

    Args:
        predictions: classes [n].
        labels: true classes int64 [n]; some of every class.
        class_counts: training images of each class [K].
        boundaries: with classes in the order of falling counts, where the medium ones begin and where the few. In the
            paper 3, 7 for CIFAR-10; 36, 71 for CIFAR-100; 390, 835 for ImageNet-LT; 842, 4543 for iNaturalist 2018.

    Raises:
        DataError: a class has no test image.
    """
    num_classes = len(class_counts)
    seen = np.bincount(labels, minlength=num_classes)
    if not seen.all():
        raise DataError(f"class {int(seen.argmin())} has no test image; its accuracy is not known")
    right = np.bincount(labels[predictions == labels], minlength=num_classes)
    by_count = np.argsort(-np.asarray(class_counts), kind="stable")
    many, medium, few = (float(group.mean()) for group in np.split((right / seen)[by_count], boundaries))
    return GroupAccuracy(overall=float(right.sum() / seen.sum()), many=many, medium=medium, few=few)


def disagreement(logits: Tensor, other_logits: Tensor) -> float:
    """Share of images whose largest logits [n, K] are of different classes."""
    return float((logits.argmax(dim=1) != other_logits.argmax(dim=1)).double().mean())


def feature_rank(features: Tensor, energy: float = ENERGY) -> int:
    """How many singular values of the centred features [n, D] hold `energy` of the squared sum; 0 if all are equal."""
    centred = features.double() - features.double().mean(dim=0)
    held = torch.linalg.svdvals(centred).square().cumsum(dim=0)  # [min(n, D)], rising
    return int((held < energy * held[-1]).sum()) + int(held[-1] > 0)


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """What `attention` multiplies values with [B, heads, N, N], for its input [B, N, D]."""
    q, k, _ = attention.qkv(x).split(attention.widths.qkv_dims, dim=2)
    q, k = (part.unflatten(2, (attention.widths.num_heads, -1)).transpose(1, 2) for part in (q, k))  # [B, heads, N, QK]
    return (q * attention.softmax_scale @ k.transpose(2, 3)).softmax(dim=-1)


def mean_attention_distance(weights: Tensor, *, num_prefix_tokens: int, patch_size: int) -> Tensor:
    """How far patches look, in pixels of the model's image: [B, heads].

    Args:
        weights: [B, heads, N, N], each row with a sum of 1; patches in rows of a square image.
        num_prefix_tokens: P.
        patch_size: side of a patch in pixels.
    """
    between_patches = weights[:, :, num_prefix_tokens:, num_prefix_tokens:]
    shares = between_patches / between_patches.sum(dim=3, keepdim=True)
    side = round(shares.shape[3] ** 0.5)
    axis = torch.arange(side, device=weights.device, dtype=weights.dtype) * patch_size
    centres = torch.cartesian_prod(axis, axis)  # [N - P, 2]
    distances = (centres[:, None] - centres).norm(dim=2)  # exact, where cdist is not for near points
    return (shares * distances).sum(dim=3).mean(dim=2)


def _trace(model: VisionTransformer, images_nchw: Tensor, blocks: Sequence[int]) -> tuple[Tensor, ...]:
    """Of a batch: both logits [B, K], DIST tokens [B, depth, D], and distances [B, heads] for each of `blocks`."""
    x = model.embed(images_nchw)
    tokens, distances = [], {}
    for index, block in enumerate(model.blocks):
        if index in blocks:
            weights = attention_weights(block.attn, block.norm1(x))
            distances[index] = mean_attention_distance(
                weights, num_prefix_tokens=model.num_prefix_tokens, patch_size=model.patch_size
            )
        x = block(x)
        tokens.append(x[:, 1])
    features = model.norm(x[:, : model.num_prefix_tokens]).flatten(1)
    return *model.head.separate(features), torch.stack(tokens, dim=1), *(distances[block] for block in blocks)
