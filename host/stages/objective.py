"""From a recipe's tables to what is trained: the model with its loss, and the teacher it follows."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from host.distill.deit_lt import DeiTLT
from host.distill.feature import FeatureDistillation
from host.distill.hard import HardDistillation
from host.distill.ldam import LDAM
from host.distill.method import Distillation
from host.distill.paco import PaCo
from host.distill.soft import SoftDistillation
from host.distill.spec import DistillSpec
from host.distill.teacher import FrozenTeacher
from host.errors import RecipeError
from host.training.config import TrainConfig
from host.training.objective import CrossEntropy, Objective
from host.training.turned import LogitsLoss, TurnedImages


def make_objective(
    model: nn.Module,
    config: TrainConfig,
    labels: np.ndarray,
    *,
    seed: int,
    distill: DistillSpec | None = None,
    teacher: nn.Module | None = None,
) -> Objective:
    """What the recipe wants trained.

    Args:
        model: the student, or a teacher.
        config: says the loss.
        labels: int64 [N] of the training images, whose counts the long-tail losses need.
        seed: of what the loss itself trains and throws away; the caller's random state is left alone.
        distill: how to follow `teacher`; None without one.
        teacher: with the model's classes.

    Raises:
        RecipeError: turned images with a method that has no loss of logits, or a long-tail loss together with a teacher.
        ModelError: teacher and student do not fit.
        DataError: a long-tail loss, and a class without images.
    """
    counts = np.bincount(labels, minlength=model.head.out_features).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if distill is None or teacher is None:
            return _plain(model, config, counts)
        return _distilled(model, config, counts, distill, FrozenTeacher(teacher, num_classes=model.head.out_features))


def _plain(model: nn.Module, config: TrainConfig, counts: list[int]) -> Objective:
    if config.loss == "ldam":
        return LDAM(model, counts, reweight_from_epoch=config.reweight_from_epoch)
    if config.loss == "paco":
        return PaCo(model, counts)
    if not config.turned_share:
        return CrossEntropy(model, label_smoothing=config.label_smoothing)
    return _turned(
        model,
        config,
        lambda logits, images, labels: F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing),
    )


def _distilled(
    model: nn.Module, config: TrainConfig, counts: list[int], distill: DistillSpec, teacher: FrozenTeacher
) -> Objective:
    if config.loss != "cross-entropy":
        raise RecipeError(f'train.loss "{config.loss}" trains without a teacher; leave out the table distill, or loss')
    smoothing = config.label_smoothing
    if distill.method == "deit-lt":
        objective: Objective = DeiTLT(
            model, teacher, counts, reweight_from_epoch=config.reweight_from_epoch, label_smoothing=smoothing
        )
    elif distill.method == "feature":
        objective = FeatureDistillation(model, teacher, weight=distill.weight, label_smoothing=smoothing)
    elif distill.method == "hard":
        objective = HardDistillation(model, teacher, weight=distill.weight, label_smoothing=smoothing)
    else:
        objective = SoftDistillation(
            model, teacher, temperature=distill.temperature, weight=distill.weight, label_smoothing=smoothing
        )
    if not config.turned_share:
        return objective
    if distill.method not in ("soft", "hard") or not isinstance(objective, Distillation):
        raise RecipeError(f"train.turned_share cannot go with distill.method {distill.method!r}; set it to 0")
    return _turned(model, config, objective.loss_of_logits)


def _turned(model: nn.Module, config: TrainConfig, upright_loss: LogitsLoss) -> TurnedImages:
    return TurnedImages(model, upright_loss, share=config.turned_share, label_smoothing=config.label_smoothing)
