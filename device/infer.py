"""Classify files once, with the served model and what the board has learned; changes nothing, so it may run beside the agent."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from device.config import AgentConfig, beside_agent, resolve_runtime
from device.contract.board import Board
from device.contract.errors import ArtifactError
from device.frames import read_frame
from device.modules import forbidden_modules
from device.serving import Model
from device.slots import Slots
from device.sources.directory import named_frames


def infer_files(
    root: Path, config: AgentConfig, board: Board, paths: list[Path], *, precision: str = ""
) -> dict[str, Any]:
    """Classify frames.

    Args:
        root: the agent's data directory.
        config: its configuration.
        board: its board profile.
        paths: image files, or directories of them.
        precision: another artifact of the served bundle.

    Raises:
        ArtifactError: no model is installed, or it has no such artifact.
        FrameError: a file is missing or cannot be read, or a directory holds none.
    """
    slots = Slots(root)
    entry = slots.serving()
    if entry is None:
        raise ArtifactError(f"{root}: no model is installed; run 'fieldvit-device update'")
    runtime = resolve_runtime(board, beside_agent(config.runtime))
    model = Model.load(slots, entry.slot, precision or entry.precision, runtime)
    results, latencies_ms = [], []
    for frame_id, path in named_frames(paths):
        pixels = read_frame(path, model.manifest.input.channels)
        started = time.perf_counter()
        _, answer = model.infer(pixels)
        latencies_ms.append((time.perf_counter() - started) * 1000)
        scores = dict(zip(model.classifier.head.labels, map(float, answer.scores), strict=True))
        result = {"frame_id": frame_id, "label": answer.label, "confidence": answer.confidence}
        results.append(result | {"latency_ms": latencies_ms[-1], "scores": scores})
    p50, p90, p99 = np.percentile(latencies_ms, [50, 90, 99])
    return {
        "model": f"{model.manifest.name} {model.manifest.version}",
        "precision": model.artifact.precision,
        "learned_version": model.classifier.head.version,
        "results": results,
        "latency_ms": {"p50": float(p50), "p90": float(p90), "p99": float(p99)},
        "modules_ok": not forbidden_modules(),
    }
