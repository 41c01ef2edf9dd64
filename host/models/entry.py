"""What is known of a model before it is built: its name, its input, its size and where it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

StateDict = Mapping[str, Tensor]


def _same_names(state: StateDict) -> dict[str, Tensor]:
    return dict(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model of the registry.

    Attributes:
        family, variant: together its name.
        build: takes `num_classes` and `in_chans`, and `**options`.
        image_size: images are that many pixels square.
        paper: where the architecture is from, as `arXiv:NUMBER`.
        parameters, macs: exact counts for `num_classes` and `in_chans`; MACs are those of convolutions and matrix
            products for one image.
        is_exact: True for a published configuration, with the parameters that are stated of it; where a part of it is
            assumed, the summary says so. False for one of ours.
        num_classes, in_chans: of the published configuration.
        timm_name: timm's name of the same model, whose weights this one loads; empty where timm has none.
        from_timm: gives timm's weights the names that this model has.
        mean, std: what published weights want pixels in 0..1 to be normalized with, per channel.
        float_scopes: regular expressions on tensor names, of the parts that stay float32 in an int8 file.
    """

    family: str
    variant: str
    build: Callable[..., nn.Module]
    image_size: int
    summary: str
    paper: str
    parameters: int
    macs: int
    is_exact: bool
    num_classes: int = 1000
    in_chans: int = 3
    task: str = "classify"
    timm_name: str = ""
    from_timm: Callable[[StateDict], dict[str, Tensor]] = _same_names
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    float_scopes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """FAMILY/VARIANT, as messages and `fieldvit models` show it."""
        return f"{self.family}/{self.variant}"

    def create(self, **options: Any) -> nn.Module:
        """Build the published configuration."""
        return self.build(**{"num_classes": self.num_classes, "in_chans": self.in_chans, **options})
