"""The backbone of one artifact, on what this board is told to run it: images to features."""

from pathlib import Path
from typing import Protocol

import numpy as np

from device.contract.board import COREML, PROCESSOR
from device.contract.errors import EngineError
from device.contract.manifest import Artifact, Manifest
from device.engine import Engine
from device.runtime import tflite_runtime


class Backbone(Protocol):
    """An engine: `delegate` is what runs it, `delegate_problem` why that is not the one that was asked for."""

    path: Path
    delegate: str
    delegate_problem: str

    def features(self, frame: np.ndarray) -> np.ndarray:
        """One pre-processed frame, float32 [1, H, W, C], to float32 [D]; EngineError when it fails."""
        ...


def open_backbone(
    directory: Path,
    manifest: Manifest,
    artifact: Artifact,
    *,
    threads: int,
    delegate: str,
    caches: Path | None = None,
) -> Backbone:
    """Load an artifact of an extracted bundle, whose files were checked against its manifest.

    With a directory for `caches` its packed weights are kept there, if the processor is to run it.

    With the delegate coreml it is the bundle's Core ML package, held to the artifact's golden outputs; where that cannot be
    loaded, and with any other delegate, it is the TFLite file.

    Raises:
        RuntimeMismatchError: the runtime lacks an operation, or computes artifacts of this precision wrongly.
        EngineError: the file is no valid model, the system has no room for it now, or there is no runtime.
    """
    tflite, problem = directory / artifact.path, ""
    if delegate == COREML:
        try:
            return _open_coreml(directory, manifest)
        except EngineError as error:
            problem = str(error)
    tflite_runtime().require_right(artifact.precision)
    if caches and delegate == PROCESSOR:
        try:
            return _open_cached(tflite, caches, manifest.files[artifact.path].sha256, threads)
        except EngineError as error:
            problem = str(error)
    engine = Engine(tflite, num_threads=threads, delegate=delegate)
    engine.delegate_problem = engine.delegate_problem or problem
    return engine


def _open_coreml(directory: Path, manifest: Manifest) -> Backbone:
    from device.coreml import CoreMLEngine  # here: one kind of board needs it

    if manifest.coreml is None:
        raise EngineError(f"delegate {COREML}: {manifest.name} {manifest.version} holds no Core ML package")
    return CoreMLEngine(directory / manifest.coreml.path, manifest.input)


def _open_cached(tflite: Path, caches: Path, sha256: str, threads: int) -> Backbone:
    from device.cached_engine import CachedEngine, cache_path  # here: only where agent.toml asks for it

    return CachedEngine(tflite, cache_path(caches, sha256), num_threads=threads)
