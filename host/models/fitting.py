"""Published tensors in the shapes of a model: for images with other channels, and for images of another size.

What belongs to a grid of positions is resampled as timm does it: position embeddings, and attention biases by absolute
offset as LeViT's, both bicubic. What mixes positions by weights of their own, as NiNformer's token FF, is not.
"""

from math import isqrt

from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_levit
from timm.models import adapt_input_conv
from torch import Tensor

from host.models.entry import StateDict


def fit(name: str, tensor: Tensor, own: Tensor, *, num_prefix_tokens: int = 0) -> Tensor | None:
    """The tensor in the shape of ours, or None where it cannot be.

    Args:
        name: of both, in the state dict.
        tensor: as published.
        own: the model's.
        num_prefix_tokens: how many tokens without a place in the image a position embedding begins with.
    """
    if tensor.shape == own.shape:
        return tensor
    if is_other_input(tensor, own):
        return adapt_input_conv(own.shape[1], tensor)
    if tensor.ndim != own.ndim:
        return None
    match name.rpartition(".")[2]:
        case "pos_embed":
            return _fit_positions(tensor, own, num_prefix_tokens)
        case "attention_biases":
            return _fit_biases(tensor, own)
        case "attention_bias_idxs":
            return own  # they follow from the grid
    return None


def is_other_input(tensor: Tensor, own: Tensor) -> bool:
    """Whether these are one convolution, for colour images and for other channels."""
    if tensor.shape == own.shape or not tensor.ndim == own.ndim == 4:
        return False
    return tensor.shape[1] == 3 and tensor.shape[0] == own.shape[0] and tensor.shape[2:] == own.shape[2:]


def is_other_grid(tensor: Tensor, own: Tensor) -> bool:
    """Whether these may be of one model for two image sizes: axes that differ count the cells of a square grid.

    Kernels have no such axes.
    """
    return tensor.ndim == own.ndim < 4 and all(
        before == after or (_is_square(before) and _is_square(after))
        for before, after in zip(tensor.shape, own.shape, strict=True)
    )


def resampled(state: StateDict, own: StateDict) -> list[str]:
    """What `fit` resamples of a state, in words."""
    words = {"pos_embed": "position embedding", "attention_biases": "attention bias"}
    found = [
        f"{words[kind]} resampled from {_grid(tensor)} to {_grid(own[name])}"
        for name, tensor in state.items()
        if (kind := name.rpartition(".")[2]) in words and name in own and tensor.shape != own[name].shape
    ]
    return sorted(set(found))  # a file holds its tensors in no particular order


def _fit_positions(tensor: Tensor, own: Tensor, num_prefix_tokens: int) -> Tensor | None:
    """[1, P + N, D] for another number of positions N, both squares."""
    before, after = (embedding.shape[1] - num_prefix_tokens for embedding in (tensor, own))
    if tensor.shape[2] != own.shape[2] or not (_is_square(before) and _is_square(after)):
        return None
    return resample_abs_pos_embed(tensor, [isqrt(after)] * 2, num_prefix_tokens=num_prefix_tokens)


def _fit_biases(tensor: Tensor, own: Tensor) -> Tensor | None:
    """[heads, N] for another number of offsets N, both squares."""
    if len(tensor) != len(own) or not is_other_grid(tensor, own):
        return None
    return resize_rel_pos_bias_table_levit(tensor.T, own.T.shape).T.contiguous()


def _is_square(count: int) -> bool:
    return count > 0 and isqrt(count) ** 2 == count


def _grid(tensor: Tensor) -> str:
    """The sides of the grid that the second axis counts; one or two prefix tokens are too few to add a row."""
    side = isqrt(tensor.shape[1])
    return f"{side} x {side}"
