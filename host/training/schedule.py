"""The learning rate as a function of the step, so that a resumed run needs nothing else to know it."""

import math

from host.training.config import TrainConfig

DROPS = ((0.8, 1e-2), (0.9, 1e-4))
"""Of schedule `steps`: from that share of the steps on, that share of the learning rate (Rangwani et al. 2022)."""


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of `step`, 0..steps - 1."""
    warmup = math.ceil(steps * config.warmup_share)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "steps":
        return config.learning_rate * min([1.0, *(factor for share, factor in DROPS if step >= share * steps)])
    progress = (step - warmup) / max(steps - warmup, 1)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))
