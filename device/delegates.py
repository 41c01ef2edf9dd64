"""Shared libraries that run part of a model on an accelerator: Edge TPU, GPU, NPU.

An accelerator that is missing or busy must not stop a board, so whatever is wrong with its library is an EngineError that
the caller answers by the processor. The runtimes' own `load_delegate` prints a second error from its destructor when a
library is missing or is no delegate; hence the look at it before.
"""

import ctypes

from device.contract.board import COREML, LIBRARIES, PROCESSOR
from device.contract.errors import EngineError

_ENTRY_POINTS = ("tflite_plugin_create_delegate", "tflite_plugin_destroy_delegate")


def is_library(delegate: str) -> bool:
    """Whether this delegate is a library of its own, not a part of a runtime."""
    return delegate not in (PROCESSOR, COREML)


def find_library(delegate: str) -> str:
    """The library of a delegate, after a look at whether it is one.

    Raises:
        EngineError: it is not there, cannot be loaded, or is no TFLite delegate.
    """
    library = LIBRARIES.get(delegate, delegate)
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        raise EngineError(f"delegate {delegate}: {error}; install {library}") from error
    missing = [name for name in _ENTRY_POINTS if not hasattr(loaded, name)]
    if missing:
        raise EngineError(f"delegate {delegate}: {library} is no TFLite delegate, it has no {missing[0]}")
    return library
