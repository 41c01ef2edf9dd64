"""The [distill] table of a recipe: plain data, read without PyTorch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from host.errors import RecipeError
from host.files import absolute

METHODS = ("soft", "hard", "feature", "deit-lt")
FROM_RECIPE = "train"
TIMM = "timm:"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSpec:
    """Distillation from a teacher.

    Attributes:
        method: `soft` and `hard` follow the teacher's logits, `feature` its features, `deit-lt` its labels on long-tailed
            data (re-weighted from `train.reweight_share` of the epochs on).
        teacher: `train`, to train the one of the recipe's table `teacher` first; a checkpoint that FieldViT wrote; or
            `timm:NAME`, with timm's weights from the hub, for the data's own classes.
        temperature: of `soft`.
        weight: the share of the teacher's loss.
    """

    method: str = "soft"
    teacher: str = FROM_RECIPE
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"distill.method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not self.teacher or self.teacher == TIMM:
            raise RecipeError('distill.teacher must be "train", a checkpoint, or "timm:NAME"')
        if self.temperature <= 0 or not 0 <= self.weight <= 1:
            raise RecipeError("distill: temperature must be above 0 and weight within 0..1")
        if self.method == "deit-lt" and self.weight != 0.5:
            raise RecipeError(f"distill.weight is 0.5 in method 'deit-lt', got {self.weight}; leave it out")

    @property
    def is_path(self) -> bool:
        """Whether `teacher` is a checkpoint."""
        return self.teacher != FROM_RECIPE and not self.teacher.startswith(TIMM)

    def found_from(self, folder: Path) -> Self:
        """The same with its path made absolute, from the folder that the recipe lies in."""
        return replace(self, teacher=absolute(self.teacher, folder)) if self.is_path else self
