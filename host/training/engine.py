"""The processes of a training run, through Lightning Fabric.

Fabric rather than Accelerate: it keeps no state of its own beside the object that is passed on, so that two runs fit
into one process, and leaves batches, schedule and checkpoints to the loop, which makes them repeatable.

`torchrun` starts the processes and says in the environment how many there are; without it there is one.
"""

import logging
import os
import warnings
from datetime import timedelta

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from host.errors import TrainingError

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others."""


def make_engine(precision: str = "float32") -> Fabric:
    """Join the processes that `torchrun` started, or be the only one; a GPU each where there are GPUs.

    Raises:
        TrainingError: float16 without a GPU.
    """
    if precision == "float16" and not torch.cuda.is_available():
        raise TrainingError('train.precision "float16" needs a GPU; take "bfloat16" or "float32" here')
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces precision and processes
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of kernels 1 wide; harmless
    strategy = DDPStrategy(timeout=TIMEOUT) if world > 1 else "auto"
    engine = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision=PRECISIONS[precision],
    )
    engine.launch()
    return engine


def is_connection_lost(error: Exception) -> bool:
    """Whether a collective failed because another process of the run ended."""
    text = str(error).lower()
    lost = ("connection closed by peer", "connection reset", "broken pipe", "socket", "timed out", "nccl", "gloo")
    return isinstance(error, RuntimeError) and any(words in text for words in lost)
