"""A training run of its own process or processes, for `tests/host/test_training.py`.

    python training_process.py OUT.pt          with KILL_STEP=N in the environment it kills itself after step N

Writes a checkpoint beside OUT.pt after every step, and at the end [losses of the steps done here, weights] to OUT.pt.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from device.contract.manifest import InputSpec
from host.data.digits import load_digits_split
from host.models.registry import create_model
from host.training.config import TrainConfig
from host.training.engine import make_engine
from host.training.loop import Hooks, train
from host.training.objective import CrossEntropy

SPEC = InputSpec(height=32, width=32, channels=1, mean=(0.3,), std=(0.35,))
CONFIG = TrainConfig(epochs=5, batch_size=32, crop="pad", flip=0.5, max_grad_norm=1.0)
NUM_IMAGES = 128


def main(out: Path) -> None:
    torch.set_num_threads(1)
    engine = make_engine()
    losses: list[float] = []

    def on_step(done: int, total: int, loss: float) -> None:
        losses.append(loss)
        if done == int(os.environ.get("KILL_STEP", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

    model = create_model("deit", "field-32", num_classes=8, in_chans=1)
    images = load_digits_split(0).train.take(np.arange(NUM_IMAGES))
    train(
        CrossEntropy(model),
        images,
        SPEC,
        CONFIG,
        seed=0,
        engine=engine,
        checkpoint=out.with_suffix(".safetensors"),
        checkpoint_interval_s=0,
        hooks=Hooks(on_step=on_step),
    )
    if engine.is_global_zero:
        torch.save([losses, model.state_dict()], out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
