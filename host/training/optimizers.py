"""Optimizers, and which weights decay."""

import torch
from torch import nn

from host.training.config import TrainConfig


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer for the module's trainable weights."""
    groups = decay_groups(module, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay; biases, norms, scales, tokens, position embeddings and attention biases do not."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decays = [name.endswith("weight") and parameter.ndim > 1 for name, parameter in trained]
    return [
        {"params": [p for (_, p), d in zip(trained, decays, strict=True) if d == chosen], "weight_decay": rate}
        for chosen, rate in ((True, weight_decay), (False, 0.0))
    ]
