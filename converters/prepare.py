"""What converters see of a model: NHWC in, features out, evaluation mode.

Give them the model's `deploy()`: there norms are folded and no tensor is above rank 4. What has no `deploy()` is
converted as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from converters.errors import ConversionError


class FeatureModel(Protocol):
    """What we convert: `host.models` and anything with these two members."""

    head: Callable[[Tensor], Tensor]

    def forward_features(self, images_nchw: Tensor) -> Tensor: ...


class DeployFeatures(nn.Module):
    """Backbone as boards call it: float32 [1, H, W, C] to features [1, D]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.model.forward_features(images.permute(0, 3, 1, 2))}  # [1, D]


class DeployClassifier(DeployFeatures):
    """Backbone and base head together: float32 [1, H, W, C] to features [1, D] and logits [1, K]."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.forward_features(images.permute(0, 3, 1, 2))
        return {"features": features, "logits": self.model.head(features)}


def feature_dim(model: nn.Module, input_shape: tuple[int, int, int, int]) -> int:
    """Run the deploy form once and return D.

    Raises:
        ConversionError: no `forward_features`, a bad input shape, or features that are not [1, D].
    """
    if not callable(getattr(model, "forward_features", None)):
        raise ConversionError(
            f"{type(model).__name__} has no forward_features(images_nchw); convert a model of host.models"
        )
    if len(input_shape) != 4 or input_shape[0] != 1 or min(input_shape) < 1:
        raise ConversionError(f"input shape must be (1, H, W, C), got {tuple(input_shape)}")
    with evaluating(model), torch.no_grad():
        features = DeployFeatures(model)(torch.zeros(input_shape))["features"]
    if features.ndim != 2 or features.shape[0] != 1:
        raise ConversionError(
            f"{type(model).__name__}.forward_features must return [B, D], got {list(features.shape)} for one image; "
            "pool it"
        )
    return int(features.shape[1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode and give every part its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, was_training in modes.items():
            module.training = was_training
