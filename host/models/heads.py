"""Classifiers on top of features.

A model trained with hard distillation has two linear heads: one follows the labels, the other a teacher. Their logits
are averaged at inference, which is one linear head, on one feature vector (EfficientFormer) as on two (DeiT).
"""

from collections.abc import Mapping

import torch
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
        classes, teacher = self.separate(features)
        return (classes + teacher) / 2

    def separate(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The two logits [B, K], for a trainer that compares one with labels and the other with a teacher."""
        return self.classes(features), self.teacher(features)

    def merged(self) -> nn.Linear:
        """One linear head with the same output."""
        weight = _mean(self.classes.weight, self.teacher.weight)  # [K, D]
        return make_linear(weight, _mean(self.classes.bias, self.teacher.bias))


class TokenHeads(DistillationHeads):
    """The same on two tokens: features [B, 2 D], [z_CLS ; z_DIST], to logits [B, K], with a head on each."""

    def separate(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The two logits [B, K]: those of CLS follow the labels, those of DIST a teacher."""
        z_cls, z_dist = features.chunk(2, dim=1)
        return self.classes(z_cls), self.teacher(z_dist)

    def merged(self) -> nn.Linear:
        """One linear head on both tokens with the same output."""
        weight = torch.cat([self.classes.weight, self.teacher.weight], dim=1) / 2  # [K, 2 D]
        return make_linear(weight, _mean(self.classes.bias, self.teacher.bias))


def _mean(first: Tensor, second: Tensor) -> Tensor:
    """Computed in float64."""
    return ((first.double() + second.double()) / 2).to(first)


def join_heads(state: StateDict, prefix: str = "head.") -> dict[str, Tensor]:
    """The state of a model with `DistillationHeads` for the same model with one linear head, which gives their mean.

    Other states come back as they are.
    """
    joined = dict(state)
    for part in ("weight", "bias"):
        heads = [joined.pop(f"{prefix}{name}.{part}", None) for name in ("classes", "teacher")]
        if heads[0] is not None:
            joined[f"{prefix}{part}"] = heads[0] if heads[1] is None else _mean(*heads)
    return joined


def renamed(state: StateDict, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the first prefix that fits each name; names that none fits are kept."""
    return {_rename(name, prefixes): tensor for name, tensor in state.items()}


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
