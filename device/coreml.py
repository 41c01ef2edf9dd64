"""The backbone of a bundle's Core ML package, on a Mac whose agent is told so (`delegate = "coreml"`).

coremltools runs models on macOS alone. On other systems only the refusal and the handling of shapes can be seen, which is
all that the tests do; nothing here was run on a Mac.
"""

import platform
import threading
from pathlib import Path
from typing import Any

import numpy as np

from device.contract.board import COREML
from device.contract.errors import EngineError
from device.contract.manifest import InputSpec

INPUT, FEATURES = "images", "features"


class CoreMLEngine:
    """The `features` of an `.mlpackage`; what learns on them is the bundle's head, as with TFLite."""

    delegate, delegate_problem = COREML, ""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        """Compile and load a package.

        Args:
            path: the `.mlpackage` directory.
            spec: of the model's input.

        Raises:
            EngineError: this is no Mac, coremltools is not installed, or Core ML refuses the package.
        """
        self.path, self._shape = path, (1, spec.height, spec.width, spec.channels)
        self._lock = threading.Lock()
        self._model = _load(path)

    def features(self, frame: np.ndarray) -> np.ndarray:
        """Run the backbone on one pre-processed frame, float32 [1, H, W, C]; returns float32 [D].

        Raises:
            EngineError: another shape or dtype, or Core ML failed.
        """
        if frame.shape != self._shape or frame.dtype != np.float32:
            raise EngineError(f"{INPUT} must be float32 {list(self._shape)}, got {frame.dtype} {list(frame.shape)}")
        with self._lock:
            try:
                outputs = self._model.predict({INPUT: frame})
            except Exception as error:  # coremltools passes on whatever Core ML raises
                raise EngineError(f"{self.path}: {FEATURES} failed ({error})") from error
        if FEATURES not in outputs:
            raise EngineError(f"{self.path}: has no output {FEATURES}, only {sorted(outputs)}; export it again")
        return np.array(outputs[FEATURES][0], np.float32)


def _load(path: Path) -> Any:
    if platform.system() != "Darwin":
        raise EngineError(f"delegate {COREML}: Core ML is in macOS, this is {platform.system()}")
    try:
        import coremltools
    except ImportError as error:
        raise EngineError(f"delegate {COREML}: {error}; pip install coremltools") from error
    try:
        return coremltools.models.MLModel(str(path))
    except Exception as error:  # as above
        raise EngineError(f"{path}: Core ML cannot load it ({error}); install a sound bundle") from error
