"""How to train: plain data, read from a recipe without PyTorch."""

from dataclasses import dataclass

from host.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The [train] table of a recipe.

    The learning rate rises linearly over the first `warmup_share` of all steps, then falls to 0 along a cosine.
    `turned_share` of the images are turned by 90, 180 or 270 degrees and count as classes of their own, which makes
    features that tell more apart than the labels ask for; it is what new classes are learned from later.
    """

    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    max_grad_norm: float = 5.0
    augment_strength: float = 1.0
    turned_share: float = 0.375

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"train.{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "augment_strength"):
            if getattr(self, name) < 0:
                raise RecipeError(f"train.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("warmup_share", "label_smoothing", "turned_share"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"train.{name} must be at least 0 and below 1, got {getattr(self, name)}")


TEACHER_CONFIG = TrainConfig(epochs=15, turned_share=0.0)
"""How the small CNN teacher is trained."""
