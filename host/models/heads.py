"""Classifiers on top of features.

A model trained with hard distillation has two linear heads on one feature vector (EfficientFormer): one follows the
labels, the other a teacher. Their logits are averaged at inference, which is one linear head with averaged weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
        """The two logits [B, K], which distillation compares with labels and teacher."""
        return self.classes(features), self.teacher(features)

    def merged(self) -> nn.Linear:
        """One linear head with the same output."""
        return merge_linear([self.classes, self.teacher])


def merge_linear(heads: list[nn.Linear]) -> nn.Linear:
    """Average linear heads on the same features into one, computed in float64."""
    merged = nn.Linear(heads[0].in_features, heads[0].out_features).to(heads[0].weight)
    with torch.no_grad():
        merged.weight.copy_(torch.stack([head.weight.double() for head in heads]).mean(dim=0))
        merged.bias.copy_(torch.stack([head.bias.double() for head in heads]).mean(dim=0))
    return merged


def renamed(state: StateDict, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the first prefix that fits each name; names that none fits are kept."""
    return {_rename(name, prefixes): tensor for name, tensor in state.items()}


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
