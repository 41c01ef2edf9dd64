"""The LiteRT interpreter behind one lock: images to features, features to logits.

The only module that imports LiteRT. A model is loaded from its path, so that its weights stay memory-mapped; files in a
slot are never rewritten in place. One interpreter must not be used by two threads (measured: 22-52 % wrong results),
hence the lock; a signature runner silently resizes to a wrong image size, hence the shape checks here.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from device.contract.errors import EngineError

FEATURES = "features"


class Engine:
    """One TFLite model with the signatures `features`, `infer_f` and `train_f`."""

    def __init__(self, path: Path, *, num_threads: int = 1) -> None:
        """Load and allocate a model.

        Raises:
            EngineError: the file is missing, is no valid model, or has no `features` signature.
        """
        self.path = path
        self._lock = threading.Lock()
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=num_threads)
            signatures: dict[str, Any] = self._interpreter.get_signature_list()
            if FEATURES not in signatures:
                raise EngineError(f"{path}: has no '{FEATURES}' signature, only {sorted(signatures)}; export it again")
            self._interpreter.allocate_tensors()
            self._runners = {name: self._interpreter.get_signature_runner(name) for name in signatures}
        except (ValueError, RuntimeError, OSError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(
                f"{path}: LiteRT cannot load it ({' '.join(str(error).split())}); install a sound bundle"
            ) from error
        self._inputs = {
            name: {
                key: (tuple(map(int, detail["shape"])), detail["dtype"])
                for key, detail in runner.get_input_details().items()
            }
            for name, runner in self._runners.items()
        }

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
