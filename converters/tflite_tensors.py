"""Every tensor of a TFLite backbone on given images, and each of its operations alone on inputs of our choice.

Both run LiteRT's built-in kernels without a delegate: inside one, there are no tensors to look at. Meant for a child
process (`converters.isolate`); so nothing heavy is imported here.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters import flatbuffer

Feeds = dict[int, np.ndarray]
"""Inputs of one operation: position to array [N, ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation: its kind, and the indices of its tensors."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneRun:
    """What a backbone computed for N images.

    Args:
        operations: in the order they run.
        names: of all tensors, by index.
        ranges: lowest and highest value that each quantized tensor can hold.
        values: float32 [N, ...] of each tensor that depends on the image, dequantized.
        weights: float32 constants that operations use, and int8 ones dequantized.
        weight_steps: size of a quantization step of each symmetric int8 constant, in a shape that broadcasts to it.
        halves: tensors that are float16 constants, widened; among `values` and the same for every image.
    """

    operations: tuple[Operation, ...]
    names: dict[int, str]
    ranges: dict[int, tuple[float, float]]
    values: dict[int, np.ndarray]
    weights: dict[int, np.ndarray]
    weight_steps: dict[int, np.ndarray]
    halves: frozenset[int]


def open_backbone(path: Path) -> Callable[[np.ndarray], BackboneRun]:
    """Load a file; what is returned runs images float32 [N, H, W, C] and keeps every tensor."""
    model = flatbuffer.read_model(path)
    graph = flatbuffer.backbone(model)
    operations = _operations(model, graph)
    interpreter = _interpreter(model)
    moving = [*map(int, graph.inputs), *(index for operation in operations for index in operation.outputs)]
    details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    fixed = {index for operation in operations for index in operation.inputs if index >= 0} - set(moving)
    halves = frozenset(
        operation.outputs[0]
        for operation in operations
        if operation.kind == "DEQUANTIZE" and details[operation.inputs[0]]["dtype"] == np.float16
    )
    fixed = {index for index in fixed if details[index]["dtype"] in (np.float32, np.int8)}
    steps = {index: _steps(details[index]) for index in fixed if _is_symmetric(details[index])}

    def run(images: np.ndarray) -> BackboneRun:
        kept: dict[int, list[np.ndarray]] = {index: [] for index in moving}
        for image in images:
            interpreter.set_tensor(int(graph.inputs[0]), image[None])
            interpreter.invoke()
            for index in moving:
                kept[index].append(_dequantized(interpreter.get_tensor(index), details[index]))
        return BackboneRun(
            operations=operations,
            names={index: tensor.name.decode() for index, tensor in enumerate(graph.tensors)},
            ranges={index: _range(details[index]) for index in moving if len(_scales(details[index]))},
            values={index: np.stack(values) for index, values in kept.items()},
            weights={index: _dequantized(interpreter.get_tensor(index), details[index]) for index in fixed},
            weight_steps=steps,
            halves=halves,
        )

    return run


def open_operations(path: Path) -> Callable[[Sequence[Feeds]], list[list[np.ndarray]]]:
    """Load a file and cut it between its operations.

    What is returned takes the inputs of each operation, in their order, and gives each one's outputs [N, ...]. Inputs
    that depend on no image are the file's own constants.
    """
    model = flatbuffer.read_model(path)
    graph = flatbuffer.backbone(model)
    operations = _operations(model, graph)
    moving = {*map(int, graph.inputs), *(index for operation in operations for index in operation.outputs)}
    places: list[dict[int, int]] = []
    for operator in graph.operators:
        place = {}
        for position, index in enumerate(map(int, operator.inputs)):
            if index in moving:
                place[position] = _twin(graph, index)
        operator.inputs = [place.get(position, int(index)) for position, index in enumerate(operator.inputs)]
        places.append(place)
    graph.inputs = [twin for place in places for twin in place.values()]
    graph.outputs = [index for operation in operations for index in operation.outputs]
    interpreter = _interpreter(model)

    def run(feeds: Sequence[Feeds]) -> list[list[np.ndarray]]:
        kept: list[list[list[np.ndarray]]] = [[[] for _ in operation.outputs] for operation in operations]
        for number in range(max(len(array) for feed in feeds for array in feed.values())):
            for place, feed in zip(places, feeds, strict=True):
                for position, twin in place.items():
                    if position in feed:
                        shape, dtype = graph.tensors[twin].shape, interpreter.get_tensor(twin).dtype
                        interpreter.set_tensor(twin, feed[position][number].reshape(shape).astype(dtype))
            interpreter.invoke()
            for operation, outputs in zip(operations, kept, strict=True):
                for index, values in zip(operation.outputs, outputs, strict=True):
                    values.append(interpreter.get_tensor(index))
        return [[np.stack(values) for values in outputs] for outputs in kept]

    return run


def _operations(model: Any, graph: Any) -> tuple[Operation, ...]:
    return tuple(
        Operation(
            kind=flatbuffer.operator_name(model, operator),
            inputs=tuple(map(int, operator.inputs)),
            outputs=tuple(map(int, operator.outputs)),
        )
        for operator in graph.operators
    )


def _twin(graph: Any, index: int) -> int:
    """A new tensor of the same type and shape, to be fed from outside."""
    from ai_edge_litert import schema_py_generated as schema

    tensor = graph.tensors[index]
    graph.tensors.append(
        schema.TensorT(shape=list(tensor.shape), type=tensor.type, buffer=0, name=f"fed_{len(graph.tensors)}".encode())
    )
    return len(graph.tensors) - 1


def _interpreter(model: Any) -> Any:
    """An interpreter of the model's first graph, with all its tensors kept."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with tempfile.TemporaryDirectory(prefix="fieldvit-layers-") as directory:
        path = Path(directory) / "model.tflite"
        flatbuffer.write_model(model, path)
        interpreter = Interpreter(
            model_content=path.read_bytes(),
            num_threads=1,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
    interpreter.allocate_tensors()
    return interpreter


def _scales(detail: Any) -> np.ndarray:
    return np.asarray(detail["quantization_parameters"]["scales"])


def _is_symmetric(detail: Any) -> bool:
    return len(_scales(detail)) > 0 and not np.any(detail["quantization_parameters"]["zero_points"])


def _range(detail: Any) -> tuple[float, float]:
    limits = np.iinfo(detail["dtype"])
    ends = np.array([limits.min, limits.max])
    zero_point, scale = detail["quantization_parameters"]["zero_points"][0], _scales(detail)[0]
    low, high = (ends.astype(np.float32) - zero_point) * scale
    return float(low), float(high)


def _dequantized(value: np.ndarray, detail: Any) -> np.ndarray:
    """The real values, float32, of one image's tensor."""
    scales = _scales(detail)
    if not len(scales):
        return value.astype(np.float32)
    zero_points = np.asarray(detail["quantization_parameters"]["zero_points"]).reshape(_steps(detail).shape)
    return ((value.astype(np.float32) - zero_points) * _steps(detail)).astype(np.float32)


def _steps(detail: Any) -> np.ndarray:
    """Scales in a shape that broadcasts to the tensor's: one, or one per index of its quantized dimension."""
    scales = _scales(detail)
    shape = [1] * max(len(detail["shape"]), 1)
    if len(scales) > 1:
        shape[detail["quantization_parameters"]["quantized_dimension"]] = len(scales)
    return scales.reshape(shape)
