"""A TFLite interpreter whose packed weights lie in a file: `runtime.weight_cache = true`.

XNNPACK packs all weights anew at each load and keeps them in memory of the process's own. With a cache they are packed once
and mapped from a file after that: EfficientFormer-L1 in float32 takes 28 MB of such memory instead of 69, for 45 MB of
disk (x86-64; starts are not faster, `CompiledModel` takes as long to import as the packing took). Only LiteRT's `CompiledModel` offers it; `Interpreter` takes no option for it.

XNNPACK does not ask whether a cache belongs to the model: another model's gives that model's answers. A cache is therefore
named by what it was made of (`cache_path`), and is used only while its SHA-256 is the one noted when it was made.
`CompiledModel` dies of damaged models that `Interpreter` refuses, so the self-test's child process loads each with that first,
and then with a cache of its own, as the agent will.
"""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from device.contract.board import PROCESSOR
from device.contract.errors import EngineError
from device.contract.files import sync_directory, write_atomic
from device.runtime import compiled_model, runtime_name

FEATURES = "features"
KEPT = 2
"""Caches that stay: one for each slot."""
_PROCESSOR = ("model name", "flags", "Features", "CPU part")


class CachedEngine:
    """The signature `features` of one TFLite model, on the processor."""

    def __init__(self, path: Path, cache: Path, *, num_threads: int = 1) -> None:
        """Load a model, with the packed weights of `cache` where that is whole; else they are packed into it.

        Raises:
            EngineError: the runtime has no weight caches, refuses the model, or the disk refuses the file.
        """
        self.path, self.delegate, self.delegate_problem = path, PROCESSOR, ""
        self._lock = threading.Lock()
        try:
            if is_whole(cache):
                self._open(cache, num_threads)
                os.utime(cache)
            else:
                self._pack(cache, num_threads)
            _remove_oldest(cache.parent)
        except EngineError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"{path}: no weight cache ({' '.join(str(error).split())})") from error

    def features(self, frame: np.ndarray) -> np.ndarray:
        """Run the backbone on one pre-processed frame, float32 [1, H, W, C]; returns float32 [D].

        Raises:
            EngineError: another shape or dtype, or the runtime failed.
        """
        if frame.shape != self._shape or frame.dtype != np.float32:
            raise EngineError(f"{FEATURES}: must be float32 {list(self._shape)}, got {frame.dtype} {list(frame.shape)}")
        with self._lock:
            try:
                self._input.write(frame)
                self._model.run_by_index(self._signature, [self._input], [self._output])
                return np.array(self._output.read(self._dim, np.float32), np.float32)
            except (ValueError, RuntimeError) as error:
                raise EngineError(f"{self.path}: {FEATURES} failed ({error})") from error

    def _pack(self, cache: Path, num_threads: int) -> None:
        """Into a file of this process's own, which gets its name when it is whole."""
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
        for rest in cache.parent.glob("*.part"):  # of a process that died
            rest.unlink(missing_ok=True)
        try:
            self._open(part, num_threads)
            if part.exists():
                _seal(part, cache)
        finally:
            part.unlink(missing_ok=True)

    def _open(self, cache: Path, num_threads: int) -> None:
        model: Any = compiled_model(self.path, cache, num_threads)
        if FEATURES not in model.get_signature_list():
            raise EngineError(f"{self.path}: has no '{FEATURES}' signature; export it again")
        (image,) = model.get_input_tensor_details(FEATURES).values()
        (features,) = model.get_output_tensor_details(FEATURES).values()
        self._shape, self._dim = tuple(map(int, image["shape"])), int(features["shape"][-1])
        self._model, self._signature = model, model.get_signature_index(FEATURES)
        (self._input,) = model.create_input_buffers(self._signature)
        (self._output,) = model.create_output_buffers(self._signature)


def cache_path(directory: Path, model_sha256: str) -> Path:
    """The cache of a model: named by its SHA-256, the runtime and the processor, for which weights are packed."""
    key = hashlib.sha256("\n".join([model_sha256, runtime_name(), *_processor()]).encode()).hexdigest()
    return directory / f"{key[:32]}.xnnpack"


def is_whole(cache: Path) -> bool:
    """Whether a cache is what it was when it was made."""
    try:
        return _digest(cache) == _note(cache).read_text()
    except OSError:
        return False


def _seal(part: Path, cache: Path) -> None:
    """Give a new cache its name, and note what it holds; without the note it is made again."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    digest = _digest(part)
    _note(cache).unlink(missing_ok=True)
    part.replace(cache)
    sync_directory(cache.parent)
    write_atomic(_note(cache), digest.encode())


def _note(cache: Path) -> Path:
    return cache.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_oldest(directory: Path) -> None:
    caches = sorted(directory.glob("*.xnnpack"), key=lambda path: path.stat().st_mtime, reverse=True)
    for cache in caches[KEPT:]:
        _note(cache).unlink(missing_ok=True)
        cache.unlink(missing_ok=True)


def _processor() -> list[str]:
    """Lines that tell kinds of processors apart; none where the system has no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.partition("\t")[0].strip() in _PROCESSOR})
