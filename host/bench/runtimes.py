"""A model file behind one interface: load it, then answer one query at a time.

Runs in a worker process, so nothing here imports torch, and each runtime is imported only where it is used: the peak
memory of a worker is that of Python, NumPy, one runtime and one model.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from host.errors import BenchError

Sample = list[np.ndarray]
"""One array per input of the model, in the model's order."""

NUM_SAMPLES = 8
"""Different inputs that queries take in turn."""
SEED = 0
FLOATS, BYTES = ("float16", "float32"), ("int8", "uint8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a worker is to run.

    Attributes:
        name: how messages and tables call it.
        runtime: a key of `RUNTIMES`.
        images: real samples of a bundle's artifact, float32 [n, H, W, C]; None for random ones.
        head: weight float32 [D, K] and bias [K] of a bundle's artifact.
    """

    name: str
    path: Path
    runtime: str
    num_threads: int = 1
    images: np.ndarray | None = None
    head: tuple[np.ndarray, np.ndarray] | None = None


class Runtime(Protocol):
    """A loaded model."""

    samples: list[Sample]

    def query(self, sample: Sample) -> np.ndarray:
        """Answer one query; returns a copy of the first output."""
        ...


class BoardArtifact:
    """A bundle's artifact as the board runs it: backbone in LiteRT, then the head in NumPy."""

    def __init__(self, subject: Subject) -> None:
        from device.engine import Engine

        assert subject.images is not None
        assert subject.head is not None
        self.samples = [[image[None]] for image in subject.images]
        self._engine = Engine(subject.path, num_threads=subject.num_threads)
        self._weight, self._bias = subject.head

    def query(self, sample: Sample) -> np.ndarray:
        features = self._engine.features(sample[0])  # [D]
        return np.asarray(features[None] @ self._weight + self._bias)  # [1, K]


class TFLiteFile:
    """Any TFLite file: its first graph, whatever its inputs and outputs are."""

    def __init__(self, subject: Subject) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(subject.path), num_threads=subject.num_threads)
        self._interpreter.allocate_tensors()
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._inputs = [int(detail["index"]) for detail in inputs]
        self._outputs = [int(detail["index"]) for detail in outputs]
        declared = [(str(d["name"]), tuple(map(int, d["shape"])), np.dtype(d["dtype"]).name) for d in inputs]
        self.samples = random_samples(declared)

    def query(self, sample: Sample) -> np.ndarray:
        for index, array in zip(self._inputs, sample, strict=True):
            self._interpreter.set_tensor(index, array)
        self._interpreter.invoke()
        outputs = [self._interpreter.get_tensor(index) for index in self._outputs]
        return np.asarray(outputs[0])


class ONNXFile:
    """Any ONNX file in onnxruntime on the processor; an open first dimension is a batch of one."""

    def __init__(self, subject: Subject) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = subject.num_threads, 1
        self._session = onnxruntime.InferenceSession(str(subject.path), options, providers=["CPUExecutionProvider"])
        inputs = self._session.get_inputs()
        self._names = [value.name for value in inputs]
        self.samples = random_samples([(value.name, _fixed(value), _dtype_name(value.type)) for value in inputs])

    def query(self, sample: Sample) -> np.ndarray:
        return np.asarray(self._session.run(None, dict(zip(self._names, sample, strict=True)))[0])


RUNTIMES: dict[str, type[BoardArtifact] | type[TFLiteFile] | type[ONNXFile]] = {
    "artifact": BoardArtifact,
    "tflite": TFLiteFile,
    "onnx": ONNXFile,
}


def describe_runtime(runtime: str) -> str:
    """Name and version of what runs a key of `RUNTIMES` here."""
    return f"onnxruntime {version('onnxruntime')}" if runtime == "onnx" else f"LiteRT {version('ai-edge-litert')}"


def load(subject: Subject) -> Runtime:
    """Load a subject in its runtime; raises whatever the runtime does."""
    return RUNTIMES[subject.runtime](subject)


def random_samples(inputs: list[tuple[str, tuple[int, ...], str]], *, count: int = NUM_SAMPLES) -> list[Sample]:
    """Draw samples for inputs of (name, shape, dtype), the same in every process.

    Floats are standard normal, bytes uniform over their range.

    Raises:
        BenchError: an input has another dtype, for which random values would mean nothing.
    """
    rng = np.random.default_rng(SEED)
    return [[_random(rng, *declared) for declared in inputs] for _ in range(count)]


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype in FLOATS:
        return np.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)
    if dtype in BYTES:
        limits = np.iinfo(dtype)
        return np.asarray(rng.integers(limits.min, limits.max, size=shape, dtype=dtype, endpoint=True))
    raise BenchError(f"input {name} is {dtype}; random input is drawn for {', '.join((*FLOATS, *BYTES))} only")


def _fixed(value: Any) -> tuple[int, ...]:
    batch, *others = value.shape or [1]
    open_dimensions = [str(size) for size in others if not isinstance(size, int)]
    if open_dimensions:
        raise BenchError(f"input {value.name} leaves {', '.join(open_dimensions)} open; export it with a fixed shape")
    return (batch if isinstance(batch, int) else 1, *others) if value.shape else ()


def _dtype_name(onnx_type: str) -> str:
    """The NumPy name of `tensor(float)` and the like."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)
