"""The variants of Mobile-Former: seven of the paper, with block lists as in the public implementation, and two of ours.

Chen et al. 2022, arXiv:2108.05895; the public PyTorch implementation is AAboys/MobileFormer. `field_32` and `field_64`
are ours: narrower, for boards.
"""

from functools import partial
from typing import Any

from host.models.entry import ModelEntry
from host.models.mobileformer import MobileFormer

PAPER = "arXiv:2108.05895"
FLOAT_SCOPES = ("DynamicReLU",)
SIX_TOKENS = {"num_tokens": 6, "embed_dim": 192}
SIZES_52M: dict[str, Any] = {
    "stem_channels": 8,
    "rows": (
        *((3, 12, 2), (3, 12, 1)),
        *((6, 24, 2), (3, 24, 1)),
        *((6, 48, 2), (4, 48, 1), (6, 64, 1)),
        *((6, 96, 2), (6, 96, 1)),
    ),
    "num_tokens": 3,
    "embed_dim": 128,
    "feature_dim": 1024,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "508m": {
        "stem_channels": 24,
        "rows": (
            (2, 24, 1),
            *((6, 40, 2), (3, 40, 1)),
            *((6, 72, 2), (3, 72, 1)),
            *((6, 128, 2), (4, 128, 1), (6, 176, 1), (6, 176, 1)),
            *((6, 240, 2), (6, 240, 1), (6, 240, 1)),
        ),
        **SIX_TOKENS,
        "feature_dim": 1920,
        "dropout": 0.3,
    },
    "294m": {
        "stem_channels": 16,
        "rows": (
            (2, 16, 1),
            *((6, 24, 2), (4, 24, 1)),
            *((6, 48, 2), (4, 48, 1)),
            *((6, 96, 2), (4, 96, 1), (6, 128, 1), (6, 128, 1)),
            *((6, 192, 2), (6, 192, 1), (6, 192, 1)),
        ),
        **SIX_TOKENS,
        "feature_dim": 1920,
        "dropout": 0.3,
    },
    "214m": {
        "stem_channels": 12,
        "rows": (
            (2, 12, 1),
            *((6, 20, 2), (3, 20, 1)),
            *((6, 40, 2), (4, 40, 1)),
            *((6, 80, 2), (4, 80, 1), (6, 112, 1), (6, 112, 1)),
            *((6, 160, 2), (6, 160, 1), (6, 160, 1)),
        ),
        **SIX_TOKENS,
        "feature_dim": 1600,
        "dropout": 0.2,
    },
    "151m": {
        "stem_channels": 12,
        "rows": (
            (2, 12, 1),
            *((6, 16, 2), (3, 16, 1)),
            *((6, 32, 2), (3, 32, 1)),
            *((6, 64, 2), (4, 64, 1), (6, 88, 1), (6, 88, 1)),
            *((6, 128, 2), (6, 128, 1), (6, 128, 1)),
        ),
        **SIX_TOKENS,
        "feature_dim": 1280,
        "dropout": 0.2,
    },
    "96m": {
        "stem_channels": 12,
        "rows": (
            (2, 12, 1),
            (6, 16, 2),
            *((6, 32, 2), (3, 32, 1)),
            *((6, 64, 2), (4, 64, 1), (6, 88, 1)),
            *((6, 128, 2), (6, 128, 1)),
        ),
        "num_tokens": 4,
        "embed_dim": 128,
        "feature_dim": 1280,
        "dropout": 0.2,
    },
    "52m": {**SIZES_52M, "dropout": 0.2},
    "26m": {**SIZES_52M, "dropout": 0.1, "groups": 4},
}


def published(variant: str, **options: Any) -> MobileFormer:
    """A published variant, such as `26m`, for 224 pixels; `options` set its classes and channels, or replace a size.

    Block lists as in the public implementation; dropout as in its training commands.
    """
    return MobileFormer(**{"image_size": 224, **PUBLISHED[variant], **options})


def field_64(**options: Any) -> MobileFormer:
    """`field-64`, ours and not the paper's: for 64-pixel images, last map 4 x 4.

    Against 52M: twice as wide a stem, one downsampling fewer, 4 tokens of 96 instead of 3 of 128, and a quarter of the
    features.
    """
    sizes = {
        "image_size": 64,
        "stem_channels": 16,
        "rows": (
            (2, 16, 1),
            *((6, 32, 2), (3, 32, 1)),
            *((6, 48, 2), (4, 48, 1)),
            *((6, 96, 2), (4, 96, 1)),
        ),
        "num_tokens": 4,
        "embed_dim": 96,
        "feature_dim": 256,
    }
    return MobileFormer(**{**sizes, **options})


def field_32(**options: Any) -> MobileFormer:
    """`field-32`, ours and not the paper's: for 32-pixel images, last map 4 x 4.

    Against 52M: twice as wide a stem, two downsamplings fewer, 3 tokens of 64 instead of 128, and an eighth of the
    features.
    """
    sizes = {
        "image_size": 32,
        "stem_channels": 16,
        "rows": ((2, 16, 1), *((6, 32, 2), (3, 32, 1)), *((6, 64, 2), (4, 64, 1))),
        "num_tokens": 3,
        "embed_dim": 64,
        "feature_dim": 128,
    }
    return MobileFormer(**{**sizes, **options})


def _paper_entry(variant: str, parameters: int, macs: int) -> ModelEntry:
    sizes = PUBLISHED[variant]
    tokens = f"{sizes['num_tokens']} tokens of {sizes['embed_dim']}"
    return _entry(
        variant=variant,
        build=partial(published, variant),
        image_size=224,
        summary=f"Mobile-Former-{variant.upper()}; {len(sizes['rows']) - 1} blocks with {tokens}",
        parameters=parameters,
        macs=macs,
        is_exact=True,
    )


_entry = partial(ModelEntry, family="mobileformer", paper=PAPER, float_scopes=FLOAT_SCOPES)

ENTRIES: tuple[ModelEntry, ...] = (
    _paper_entry("508m", 13_976_976, 498_467_680),
    _paper_entry("294m", 11_422_648, 286_732_160),
    _paper_entry("214m", 9_425_920, 208_374_240),
    _paper_entry("151m", 7_595_828, 146_249_168),
    _paper_entry("96m", 4_585_252, 92_017_040),
    _paper_entry("52m", 3_469_092, 49_290_496),
    _paper_entry("26m", 3_232_788, 23_550_208),
    _entry(
        variant="field-64",
        build=field_64,
        image_size=64,
        summary="our small Mobile-Former for 64-pixel images; 6 blocks with 4 tokens of 96",
        parameters=1_142_100,
        macs=14_278_144,
        is_exact=False,
        num_classes=100,
    ),
    _entry(
        variant="field-32",
        build=field_32,
        image_size=32,
        summary="our small Mobile-Former for 32-pixel images; 4 blocks with 3 tokens of 64",
        parameters=395_194,
        macs=3_531_520,
        is_exact=False,
        num_classes=10,
    ),
)
