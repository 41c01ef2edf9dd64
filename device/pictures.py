"""Pictures as people and cameras have them, made what a model sees: upright RGB of 8 bits, on host and board alike.

Turned as EXIF says; grey, palette and CMYK become RGB; transparent parts show white, as in a browser; 16 bits are
scaled, where Pillow's own conversion would clip. Pillow is loaded when it is needed: boards whose camera writes raw
frames live without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def upright_rgb(picture: Image) -> Image:
    """An opened picture, decoded; raises what Pillow raises where it cannot be decoded to its end."""
    from PIL import ImageOps

    return _to_rgb(ImageOps.exif_transpose(picture))


def _to_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith("I"):  # PNGs of 16 bits; older versions of Pillow say "I" instead of "I;16"
        grey = np.array(picture, np.uint32)
        grey += 128
        grey //= 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """Grey uint8 [h, w, 1] of RGB uint8 [h, w, 3], as Pillow makes it (ITU-R 601-2 luma, 16-bit weights, rounded)."""
    red, green, blue = (rgb[:, :, i].astype(np.uint32) for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[:, :, None]
