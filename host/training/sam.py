"""Sharpness-aware minimization: the gradient is taken where the loss is worst within a small radius of the weights.

Source: Foret et al. 2021, arXiv:2010.01412: eps = rho * g / |g|, and the step of any optimizer with the gradient at w + eps.
Several processes climb along their common gradient, as one process with the whole batch would; the paper's climb each
along its own. Statistics of batch norms are taken from the first pass only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def climb(parameters: Sequence[nn.Parameter], radius: float) -> list[Tensor]:
    """Move weights by `radius` along their gradient; returns copies of what they were."""
    before = [parameter.clone() for parameter in parameters]
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moved]
    norm = torch.stack(torch._foreach_norm(gradients)).norm().clamp_min(1e-12)
    torch._foreach_add_(moved, torch._foreach_mul(gradients, radius / norm))
    return before


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
    """Put the weights back where they were; their gradients stay those of the second pass."""
    for parameter, weights in zip(parameters, before, strict=True):
        parameter.copy_(weights)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's statistics and do not add them to the running ones."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
