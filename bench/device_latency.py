"""Time one frame on the board's path against PyTorch on this machine, and write the table `device_latency`.

    python -m bench.device_latency

The board's path is `device.preprocess`, the `features` signature in LiteRT and the linear head, on one thread; the peer is
the same float model in PyTorch, eager, on one thread, from the same pre-processed frame. All take turns frame by frame, so
a slow moment of the machine is shared. Uses the short quickstart model, which is made first where it is missing.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.record import write_results
from device.engine import Engine
from device.preprocess import preprocess
from host.quantize.spec import FLOAT, INT8
from host.quickstart.run import quickstart_recipe
from host.stages.data import input_spec, load_model, load_split
from host.stages.head import LinearHead, fit_head
from host.stages.order import run_recipe
from host.stages.quantize import artifact_path
from host.stages.train import WEIGHTS
from host.terminal import StageLines

PEER = "PyTorch eager float32"
FRAMES = 2000
WARM_UP = 100


def main() -> int:
    torch.set_num_threads(1)
    recipe = quickstart_recipe(seed=0, short=True)
    run = run_recipe(recipe, Path("runs"), until="quantize", report=StageLines())
    split, spec = load_split(recipe), input_spec(recipe)
    model = load_model(recipe, run / "train" / WEIGHTS)
    contestants: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for precision in (INT8, FLOAT):
        engine = Engine(run / "quantize" / artifact_path(precision))
        head = fit_head(recipe, split, spec, lambda images, e=engine: np.stack([e.features(i[None]) for i in images]))
        contestants[f"device path, LiteRT {precision}"] = _device_path(engine, head.linear, spec)
    contestants[PEER] = _torch_path(model, spec)
    seconds = _interleaved(contestants, split.test.images)
    medians = {name: float(np.median(values)) * 1e3 for name, values in seconds.items()}
    rows = [
        {"path": name, "p50_ms": round(median, 4), "ratio_to_peer": round(median / medians[PEER], 3)}
        for name, median in medians.items()
    ]
    write_results(
        "device_latency",
        command="python -m bench.device_latency",
        seed=recipe.seed,
        data=f"{FRAMES} passes over scikit-learn digits, 8 x 8, enlarged to 32 x 32 by the path itself",
        rows=rows,
        title="One frame through the board's path, against PyTorch",
        notes=f"Peer: {PEER}. Medians, interleaved, one thread each. An x86 machine decides nothing for an ARM board.",
    )
    for row in rows:
        print(f"{row['path']:32} {row['p50_ms']:8.3f} ms   {row['ratio_to_peer']:.2f} x peer")
    return 0


def _device_path(engine: Engine, head: LinearHead, spec) -> Callable[[np.ndarray], np.ndarray]:
    return lambda frame: head.logits(engine.features(preprocess(frame[None], spec))[None])


def _torch_path(model: torch.nn.Module, spec) -> Callable[[np.ndarray], np.ndarray]:
    def run(frame: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(preprocess(frame[None], spec)).permute(0, 3, 1, 2)).numpy()

    return run


def _interleaved(
    contestants: dict[str, Callable[[np.ndarray], np.ndarray]], frames: np.ndarray
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(WARM_UP + FRAMES):
        for name, run in contestants.items():
            started = time.perf_counter()
            run(frames[index % len(frames)])
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
