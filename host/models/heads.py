"""Classifiers on top of features.

A model trained with hard distillation has two linear heads on one feature vector (EfficientFormer): one follows the
labels, the other a teacher. Their logits are averaged at inference, which is one linear head with averaged weights.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from host.models.deploy import make_linear
from host.models.entry import StateDict

TIMM_HEADS = {"head.fc.": "head.", "head.": "head.classes.", "head_dist.": "head.teacher."}


class DistillationHeads(nn.Module):
    """Features [B, D] to logits [B, K]: the mean of a head for the labels and a head for the teacher's labels."""

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.out_features = num_classes
        self.classes = nn.Linear(feature_dim, num_classes)
        self.teacher = nn.Linear(feature_dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return (self.classes(features) + self.teacher(features)) / 2

    def separate(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The two logits [B, K], for a trainer that compares one with labels and the other with a teacher."""
        return self.classes(features), self.teacher(features)

    def merged(self) -> nn.Linear:
        """One linear head with the same output, averaged in float64."""
        weight = (self.classes.weight.double() + self.teacher.weight.double()) / 2
        bias = (self.classes.bias.double() + self.teacher.bias.double()) / 2
        return make_linear(weight.to(self.classes.weight), bias.to(self.classes.bias))


def renamed(state: StateDict, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the first prefix that fits each name; names that none fits are kept."""
    return {_rename(name, prefixes): tensor for name, tensor in state.items()}


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
