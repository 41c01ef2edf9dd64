"""What every family refuses in the same words."""

from torch import Tensor, nn

from host.errors import ModelError


def require_images(model: nn.Module, images_nchw: Tensor) -> None:
    """Refuse images that a model was not built for, before some layer complains of shapes that nobody gave it.

    Args:
        model: has `in_chans` and `image_size`.
        images_nchw: must be [B, in_chans, image_size, image_size].

    Raises:
        ModelError: they are not.
    """
    size = model.image_size
    if images_nchw.shape[1:] != (model.in_chans, size, size):
        _refuse(model, images_nchw, f"[B, {model.in_chans}, {size}, {size}]")


def require_channels(model: nn.Module, images_nchw: Tensor) -> None:
    """The same for a model that also takes images of other sizes: [B, in_chans, H, W].

    Raises:
        ModelError: they are not.
    """
    if images_nchw.ndim != 4 or images_nchw.shape[1] != model.in_chans:
        _refuse(model, images_nchw, f"[B, {model.in_chans}, H, W]")


def require_multiple(image_size: int, multiple: int, why: str, *, at_least: int = 1) -> None:
    """Refuse an image size that a model cannot be built for; the message names the nearest ones that it can.

    Args:
        image_size: side of the images, in pixels.
        multiple: what it must be a positive multiple of.
        why: what needs that, in words.
        at_least: how many times `multiple` it must be.

    Raises:
        ModelError: it is not.
    """
    times, rest = divmod(image_size, multiple)
    if times >= at_least and not rest:
        return
    limit = f", and {at_least * multiple} or more" if at_least > 1 else ""
    nearest = f"{times * multiple} or {(times + 1) * multiple}" if times >= at_least else f"{at_least * multiple}"
    raise ModelError(
        f"image_size must be a positive multiple of {multiple}, {why}{limit}, got {image_size}; take {nearest}"
    )


def require_patches(image_size: int, patch_size: int, *, per_side: int = 1) -> None:
    """Refuse images that cannot be cut into patches, `per_side` or more along each side.

    Raises:
        ModelError: they cannot, or `patch_size` is below 1.
    """
    if patch_size < 1:
        raise ModelError(
            f"patch_size must be 1 or more, got {patch_size}; take one that divides image_size {image_size}"
        )
    require_multiple(image_size, patch_size, "the patch_size", at_least=per_side)


def require_drop_path(drop_path: float) -> None:
    """Refuse a rate of stochastic depth that is no probability, or 1, which would drop a block for good.

    Raises:
        ModelError: it is not in [0, 1).
    """
    if not 0 <= drop_path < 1:
        raise ModelError(f"drop_path must be 0 or more and below 1, got {drop_path}")


def _refuse(model: nn.Module, images_nchw: Tensor, expected: str) -> None:
    raise ModelError(
        f"this {type(model).__name__} takes images {expected}, got {list(images_nchw.shape)}; "
        "resize the images, or build the model for them"
    )
