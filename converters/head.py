"""The linear head that a phone or board trains beside the frozen backbone: forward, one SGD step, and its NumPy twin.

Functional: weights go in and come out, so state, rollback and checkpoints belong to the caller. The gradient of softmax
cross-entropy is written by hand, because an exported graph has no autograd; only built-in operations result.

K is the largest number of classes. A class that nobody taught carries the bias `UNUSED_CLASS_BIAS`: its probability is
exactly zero in float32, so its gradient is too, and no NaN can come from it (infinity would give one). Open a class by
setting its bias to the mean of the used ones.

The batch is static. Labels outside 0..K-1 mark padding rows: they count neither in the loss nor in the gradient, so a
batch of eight trains on one to eight samples. Padding rows must hold finite features, zeros for example.

This file's name is part of the contract: its tensors are recognised by `converters.head` in their names and stay float.
"""

import numpy as np
import torch
from torch import Tensor, nn

UNUSED_CLASS_BIAS = -1e4
PADDING_LABEL = -1


class InferHead(nn.Module):
    """features [B, D], W [D, K], b [K] to logits [B, K]."""

    def forward(self, f: Tensor, W: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"logits": f @ W + b}


class TrainHead(nn.Module):
    """One SGD step of softmax cross-entropy, mean over the rows that are not padding."""

    def forward(self, f: Tensor, y: Tensor, W: Tensor, b: Tensor, lr: Tensor) -> dict[str, Tensor]:
        classes = torch.arange(W.shape[1], dtype=torch.int32)
        targets = (y[:, None] == classes).to(torch.float32)  # [B, K], a zero row where the label is padding
        is_sample = targets.sum(dim=1, keepdim=True)  # [B, 1]
        num_samples = torch.clamp(is_sample.sum(), min=1.0)
        logits = f @ W + b  # [B, K]
        logits = logits - logits.amax(dim=1, keepdim=True)
        exponentials = logits.exp()
        totals = exponentials.sum(dim=1, keepdim=True)  # [B, 1], at least 1: the largest logit is 0
        loss = ((totals.log() * is_sample).sum() - (targets * logits).sum()) / num_samples
        gradient = (exponentials / totals * is_sample - targets) / num_samples  # [B, K]
        W_new = W - lr * (f.transpose(0, 1) @ gradient)
        b_new = b - lr * gradient.sum(dim=0)
        return {"loss": loss.reshape(1), "W_new": W_new, "b_new": b_new}


def empty_head(feature_dim: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """W [D, K] and b [K] of a head to which nobody has taught a class."""
    return np.zeros((feature_dim, num_classes), np.float32), np.full(num_classes, UNUSED_CLASS_BIAS, np.float32)


def train_step(
    features: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, *, learning_rate: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """`TrainHead` in NumPy, float64 inside: loss, new weight, new bias. The reference that the gate compares with."""
    features, weight, bias = features.astype(np.float64), weight.astype(np.float64), bias.astype(np.float64)
    targets = (labels[:, None] == np.arange(weight.shape[1])).astype(np.float64)  # [B, K]
    is_sample = targets.sum(axis=1, keepdims=True)
    num_samples = max(is_sample.sum(), 1.0)
    logits = features @ weight + bias
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = (np.log(np.exp(logits).sum(axis=1, keepdims=True)) * is_sample).sum() - (targets * logits).sum()
    gradient = (probabilities * is_sample - targets) / num_samples
    return (
        float(loss / num_samples),
        weight - learning_rate * features.T @ gradient,
        bias - learning_rate * gradient.sum(axis=0),
    )
