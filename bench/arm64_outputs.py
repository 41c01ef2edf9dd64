"""What every artifact of an extracted bundle says to its golden frames: the same program here and on the emulated processor.

    python -m bench.arm64_outputs BUNDLE_DIRECTORY OUTPUTS.npz

OUTPUTS.npz gets `PRECISION/features` [n, D] and `PRECISION/answers` [n]. Of this project it imports the device alone.
"""

import sys
from pathlib import Path

import numpy as np

from device.classifier import read_base_head
from device.contract.bundle import verify_directory
from device.engine import Engine
from device.golden import GOLDEN_NAME, read_arrays
from device.preprocess import preprocess


def golden_outputs(directory: Path) -> dict[str, np.ndarray]:
    """Features and answers by precision."""
    manifest = verify_directory(directory)
    frames = read_arrays(directory / GOLDEN_NAME)["frames"]
    outputs = {}
    for artifact in manifest.artifacts:
        engine = Engine(directory / artifact.path)
        weight, bias = read_base_head(directory, manifest, artifact).learner.linear()  # [D, K], [K]
        features = np.stack([engine.features(preprocess(frame[None], manifest.input)) for frame in frames])  # [n, D]
        outputs[f"{artifact.precision}/features"] = features
        outputs[f"{artifact.precision}/answers"] = (features @ weight + bias).argmax(axis=1)
    return outputs


if __name__ == "__main__":
    np.savez(sys.argv[2], **golden_outputs(Path(sys.argv[1])))
