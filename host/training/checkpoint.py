"""Checkpoints of a training run: one safetensors file that holds all that the next step depends on.

Weights, their moving average and the optimizer's tensors are the file's tensors, the rest is JSON in its header: no
pickle. Random states are not in it, for every step seeds its own (`host.training.batches`).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from host.errors import TrainingError

VERSION = 1


@dataclass(slots=True, kw_only=True)
class State:
    """A moment between two steps.

    Attributes:
        step: steps done.
        weights: of the objective, and under `ema.` their moving average.
        optimizer: as its `state_dict` gives it.
        scaler: of float16; empty elsewhere.
        records: metrics of the epochs done, and sums of the one under way.
        recipe: digest of what is trained on what; another recipe's checkpoint is not gone on from.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""


def save_state(state: State, path: Path) -> None:
    """Write a checkpoint, whole or not at all; the one before stays until then.

    Raises:
        TrainingError: a weight is not finite, or the disk is full; the checkpoint before is kept.
    """
    broken = next((name for name, tensor in state.weights.items() if not _is_finite(tensor)), None)
    if broken:
        raise TrainingError(
            f"weights {broken} are not finite after step {state.step}; the checkpoint before is kept: lower "
            "train.learning_rate, or set train.max_grad_norm"
        )
    slots = {
        f"optimizer.{index}.{name}": value
        for index, slot in state.optimizer["state"].items()
        for name, value in slot.items()
        if isinstance(value, Tensor)
    }
    header = {
        "version": VERSION,
        "step": state.step,
        "groups": state.optimizer["param_groups"],
        "scaler": state.scaler,
        "records": state.records,
        "recipe": state.recipe,
    }
    tensors = {f"weights.{name}": tensor for name, tensor in state.weights.items()} | slots
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(copies, temporary, metadata={"state": json.dumps(header)})
        _flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be written ({error}); free disk space and run again to go on") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path, *, recipe: str) -> State | None:
    """Read a checkpoint of this recipe; None where there is none, or one of another recipe.

    Raises:
        TrainingError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path}: not a checkpoint of a training ({error}); remove it to start anew") from error
    if header["recipe"] != recipe or header["version"] != VERSION:
        return None
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            slots.setdefault(int(index), {})[slot] = tensor
    return State(
        step=header["step"],
        weights={name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")},
        optimizer={"state": slots, "param_groups": header["groups"]},
        scaler=header["scaler"],
        records=header["records"],
        recipe=recipe,
    )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
