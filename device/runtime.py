"""Which TFLite runtime this board has: LiteRT, or tflite-runtime (extra `device-legacy`) where LiteRT has no wheel.

The only module that imports either. Both offer the same interpreter; what is known against one of them stands in
`WRONG`, and what a model needs that one lacks is read from the words with which it refuses the model.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from device.contract.errors import EngineError, RuntimeMismatchError
from device.contract.record import record

LITERT, TFLITE_RUNTIME = "ai-edge-litert", "tflite-runtime"
WRONG = {
    (TFLITE_RUNTIME, "dynamic"): "its fully connected layers of int8 weights and float activations come out wrong",
}
"""Precisions that a runtime loads and computes wrongly; measured by `fieldvit verify --runtimes` with tflite-runtime 2.14."""
_LACKS = (
    (re.compile(r"builtin opcode '(\w+)' version '(\d+)'"), "operation {} in version {}"),
    (re.compile(r"builtin_code out of range: (\d+)"), "operation number {}"),
    (re.compile(r"unresolved custom op: ([\w.-]*\w)"), "operation {}"),
    (re.compile(r"\((Flex\w+)\) failed to prepare"), "operation {}"),
)


@record(frozen=True, slots=True, kw_only=True)
class TfliteRuntime:
    """An installed runtime: the package's name and version, its `Interpreter` and its `load_delegate`."""

    name: str
    version: str
    interpreter: Callable[..., Any]
    load_delegate: Callable[[str], Any]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def refused_precisions(self) -> list[str]:
        return [precision for name, precision in WRONG if name == self.name]

    def require_right(self, precision: str) -> None:
        """RuntimeMismatchError where this runtime is known to compute artifacts of that precision wrongly."""
        if why := WRONG.get((self.name, precision)):
            raise RuntimeMismatchError(f"{precision}: {self} cannot run it: {why}; publish another precision too")

    def lacks(self, message: str) -> str:
        """The operation for want of which the runtime refused a model with this message; "" for any other reason."""
        for pattern, text in _LACKS:
            if found := pattern.search(message):
                return text.format(*found.groups())
        return ""


@cache
def tflite_runtime() -> TfliteRuntime:
    """The runtime of this board, imported at the first call.

    Raises:
        EngineError: there is none that can be imported; the message says why for each.
    """
    problems = []
    for name, load in ((LITERT, _litert), (TFLITE_RUNTIME, _tflite_runtime)):
        try:
            version, module = load()
        except (ImportError, OSError) as error:
            problems.append(f"{name} ({error})")
            continue
        return TfliteRuntime(
            name=name,
            version=version,
            interpreter=module.Interpreter,
            load_delegate=module.load_delegate,
        )
    raise EngineError(
        f"no TFLite runtime can be imported: {', '.join(problems)}; "
        "pip install 'fieldvit[device]', or 'fieldvit[device-legacy]' where LiteRT has no wheel"
    )


def runtime_name() -> str:
    """The runtime's name and version for reports; "none" where there is none."""
    try:
        return str(tflite_runtime())
    except EngineError:
        return "none"


def compiled_model(path: Path, weight_cache: Path, num_threads: int) -> Any:
    """LiteRT's `CompiledModel` on the processor, with a file for XNNPACK's packed weights.

    Raises:
        EngineError: this runtime has no such thing.
        RuntimeError: it refuses the model.
    """
    try:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.cpu_options import CpuOptions
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import Options
    except ImportError as error:
        raise EngineError(f"{runtime_name()} has no weight caches ({error})") from error
    cpu = CpuOptions(num_threads=num_threads, xnnpack_weight_cache_path=str(weight_cache))
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
    return CompiledModel.from_file(str(path), options=options)


def _litert() -> tuple[str, Any]:
    import ai_edge_litert
    from ai_edge_litert import interpreter

    return ai_edge_litert.__version__, interpreter


def _tflite_runtime() -> tuple[str, Any]:
    import tflite_runtime
    from tflite_runtime import interpreter

    return tflite_runtime.__version__, interpreter
