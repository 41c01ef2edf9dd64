"""A TFLite interpreter behind one lock: images to features, features to logits.

A model is loaded from its path, so that its weights stay memory-mapped; files in a
slot are never rewritten in place. One interpreter must not be used by two threads (measured: 22-52 % wrong results),
hence the lock; a signature runner silently resizes to a wrong image size, hence the shape checks here.

A delegate that is missing, or that refuses the model, is replaced by the processor; `delegate_problem` says why. What the
delegate computes is judged as everything else is, by the golden frames.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from device.contract.board import PROCESSOR
from device.contract.errors import EngineError, RuntimeMismatchError
from device.delegates import find_library, is_library
from device.runtime import tflite_runtime

FEATURES = "features"
_FAILURES = (ValueError, RuntimeError, OSError)
"""What the runtimes raise; an EngineError is a RuntimeError too."""


class Engine:
    """One TFLite model with the signatures `features`, `infer_f` and `train_f`.

    `delegate` is what runs it, `delegate_problem` why that is not the one that was asked for.
    """

    def __init__(self, path: Path, *, num_threads: int = 1, delegate: str = PROCESSOR) -> None:
        """Load and allocate a model.

        Args:
            path: the file; it must not change while it is loaded.
            num_threads: of the interpreter.
            delegate: as in the board profile's `runtime.delegate`.

        Raises:
            RuntimeMismatchError: the runtime lacks an operation of the model; the message names it.
            EngineError: the file is missing, is no valid model, or has no `features` signature; or there is no runtime.
        """
        self.path, self.delegate, self.delegate_problem = path, PROCESSOR, ""
        self._lock = threading.Lock()
        self._runtime = tflite_runtime()
        if is_library(delegate):
            self.delegate_problem = self._try_delegate(delegate, num_threads)
        if is_library(delegate) and not self.delegate_problem:
            self.delegate = delegate
            return
        try:
            self._load(num_threads, [])
        except EngineError:
            raise
        except _FAILURES as error:
            raise self._explained(error) from error

    def _try_delegate(self, delegate: str, num_threads: int) -> str:
        """Load the model with a delegate; returns why it could not be, or ""."""
        try:
            self._load(num_threads, [self._runtime.load_delegate(find_library(delegate))])
        except EngineError as error:
            return str(error)
        except _FAILURES as error:
            return f"delegate {delegate}: {_one_line(error)}"
        return ""

    def _load(self, num_threads: int, delegates: list[Any]) -> None:
        self._interpreter = self._runtime.interpreter(
            model_path=str(self.path), num_threads=num_threads, experimental_delegates=delegates
        )
        signatures: dict[str, Any] = self._interpreter.get_signature_list()
        if FEATURES not in signatures:
            raise EngineError(f"{self.path}: has no '{FEATURES}' signature, only {sorted(signatures)}; export it again")
        self._interpreter.allocate_tensors()
        self._runners = {name: self._interpreter.get_signature_runner(name) for name in signatures}
        self._inputs = {
            name: {
                key: (tuple(map(int, detail["shape"])), detail["dtype"])
                for key, detail in runner.get_input_details().items()
            }
            for name, runner in self._runners.items()
        }

    def _explained(self, error: Exception) -> EngineError:
        """What the runtime's words mean."""
        message = _one_line(error)
        if operation := self._runtime.lacks(message):
            return RuntimeMismatchError(
                f"{self.path}: {self._runtime} has no {operation}; install a newer runtime, or a bundle without it"
            )
        return EngineError(f"{self.path}: {self._runtime.name} cannot load it ({message}); install a sound bundle")

    @property
    def signatures(self) -> list[str]:
        return sorted(self._runners)

    @property
    def feature_dim(self) -> int:
        (details,) = self._runners[FEATURES].get_output_details().values()
        return int(details["shape"][-1])

    def input_shape(self, signature: str, name: str) -> tuple[int, ...]:
        return self._inputs[signature][name][0]

    def features(self, frame: np.ndarray) -> np.ndarray:
        """Run the backbone on one pre-processed frame, float32 [1, H, W, C]; returns float32 [D]."""
        (name,) = self._inputs[FEATURES]
        (output,) = self.run(FEATURES, **{name: frame}).values()
        return np.asarray(output[0])

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature; shapes and dtypes must be exactly the model's. Returns copies.

        Raises:
            EngineError: unknown signature, wrong input names, shapes or dtypes, or the runtime failed.
        """
        if signature not in self._runners:
            raise EngineError(f"{self.path}: no signature {signature!r}; it has {', '.join(self.signatures)}")
        expected = self._inputs[signature]
        if inputs.keys() != expected.keys():
            raise EngineError(f"{signature}: inputs must be {sorted(expected)}, got {sorted(inputs)}")
        for name, (shape, dtype) in expected.items():
            value = inputs[name]
            if value.shape != shape or value.dtype != dtype:
                raise EngineError(
                    f"{signature}: {name} must be {np.dtype(dtype).name} {list(shape)}, got {value.dtype} {list(value.shape)}"
                )
        with self._lock:
            try:
                outputs = self._runners[signature](**inputs)
            except (ValueError, RuntimeError) as error:
                raise EngineError(f"{self.path}: {signature} failed ({error})") from error
            return {name: np.array(value) for name, value in outputs.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
