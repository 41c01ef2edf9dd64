"""The least that classifies the frames of a directory: what the agent's cost is compared with.

    python -m bench.bare_loop MOMENTS FRAMES MODEL.tflite MANIFEST.json HEAD.npz THREADS

Decoding and pre-processing are the agent's own, which is the point; then `Interpreter`, one matrix product, argmax. No
update, no telemetry, no learning, no check of anything. Run on a board's interpreter; ends with a signal.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from bench.moments import Moments
from device.contract.manifest import Manifest
from device.frames import read_frame
from device.preprocess import preprocess

PAUSE_S = 0.05


def main() -> None:
    moments, frames, model, manifest, head, threads = sys.argv[1:]
    spec = Manifest.from_json(Path(manifest).read_bytes()).input
    linear = np.load(head)
    run(Moments(Path(moments)), Path(frames), Path(model), spec, linear["weight"], linear["bias"], int(threads))


def run(moments, frames, model, spec, weight, bias, threads) -> None:
    """Classify each file once, in the order of the names, for ever."""
    interpreter = Interpreter(model_path=str(model), num_threads=threads)
    interpreter.allocate_tensors()
    features = interpreter.get_signature_runner("features")
    (name,) = features.get_input_details()
    (output,) = features.get_output_details()
    last = ""
    while True:
        new = sorted(file for file in os.listdir(frames) if file > last and file.endswith(".npy"))
        for file in new:
            pixels, last = read_frame(frames / file, spec.channels), file
            began = time.monotonic()
            vector = features(**{name: preprocess(pixels[None], spec)})[output][0]
            int((vector @ weight + bias).argmax())
            moments.add(began, time.monotonic())
        if not new:
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
