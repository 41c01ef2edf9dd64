"""Ways to break a TFLite backbone so that it still loads and runs: one wrong weight, scale, bias, padding, activation...

Each takes a model's object form and a random generator, breaks one operation in place, and returns the name of the tensor
that is wrong first, or None where the model has nothing of the kind.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from converters import flatbuffer

Mutation = Callable[[Any, np.random.Generator], str | None]
_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_FLOAT32, _INT32, _INT8 = 0, 2, 9  # element types of the schema


def swapped_weights(model: Any, rng: np.random.Generator) -> str | None:
    """The weights of two layers of one shape change places."""
    weighted = [(operator, _constant(model, operator.inputs[1])) for operator in _operators(model, *_PRODUCTS)]
    found = [item for item in weighted if item[1] is not None]
    pairs = [
        (first, second)
        for index, first in enumerate(found)
        for second in found[index + 1 :]
        if list(first[1].shape) == list(second[1].shape) and first[1].buffer != second[1].buffer
    ]
    if not pairs:
        return None
    (operator, first), (_, second) = pairs[rng.integers(len(pairs))]
    first.buffer, second.buffer = second.buffer, first.buffer
    return _output(model, operator)


def swapped_channels(model: Any, rng: np.random.Generator) -> str | None:
    """Two output channels of one layer change places in its weights, not in its bias."""
    operator, tensor = _weighted(model, rng, "CONV_2D", "FULLY_CONNECTED")
    if operator is None:
        return None
    array = _array(model, tensor)
    one, other = rng.choice(len(array), 2, replace=False)
    array[[one, other]] = array[[other, one]]
    _store(model, tensor, array)
    return _output(model, operator)


def swapped_entries(model: Any, rng: np.random.Generator) -> str | None:
    """Two single weights of one output channel change places."""
    operator, tensor = _weighted(model, rng, "CONV_2D", "FULLY_CONNECTED")
    if operator is None:
        return None
    array = _array(model, tensor)
    channel = array[rng.integers(len(array))].reshape(-1)  # a view
    if len(channel) < 2:
        return None
    one, other = rng.choice(len(channel), 2, replace=False)
    channel[[one, other]] = channel[[other, one]]
    _store(model, tensor, array)
    return _output(model, operator)


def dropped_bias(model: Any, rng: np.random.Generator) -> str | None:
    """A bias is zero."""
    biased = [
        operator
        for operator in _operators(model, *_PRODUCTS)
        if len(operator.inputs) > 2 and operator.inputs[2] >= 0 and _constant(model, operator.inputs[2]) is not None
    ]
    if not biased:
        return None
    operator = biased[rng.integers(len(biased))]
    tensor = _graph(model).tensors[operator.inputs[2]]
    _store(model, tensor, np.zeros_like(_array(model, tensor)))
    return _output(model, operator)


def transposed_kernel(model: Any, rng: np.random.Generator) -> str | None:
    """Height and width of a kernel change places, or rows and columns of a square matrix."""
    found = []
    for operator in _operators(model, *_PRODUCTS):
        tensor = _constant(model, operator.inputs[1])
        if tensor is None:
            continue
        shape = list(tensor.shape)
        axes = (0, 1) if len(shape) == 2 else (1, 2)
        if shape[axes[0]] == shape[axes[1]] > 1:
            found.append((operator, tensor, axes))
    if not found:
        return None
    operator, tensor, axes = found[rng.integers(len(found))]
    _store(model, tensor, np.swapaxes(_array(model, tensor), *axes))
    return _output(model, operator)


def changed_pooling(model: Any, rng: np.random.Generator) -> str | None:
    """An average becomes a maximum."""
    return _replace_operation(model, rng, "AVERAGE_POOL_2D", "MAX_POOL_2D")


def changed_padding(model: Any, rng: np.random.Generator) -> str | None:
    """All padding of an axis lies on one side."""
    padded = _operators(model, "PAD")
    if not padded:
        return None
    operator = padded[rng.integers(len(padded))]
    original = _graph(model).tensors[operator.inputs[1]]
    array = _array(model, original)
    array = np.stack([array.sum(axis=1), np.zeros_like(array[:, 0])], axis=1).astype(array.dtype)
    operator.inputs = [operator.inputs[0], _add_constant(model, original, array)]  # others may share the original
    return _output(model, operator)


def changed_activation(model: Any, rng: np.random.Generator) -> str | None:
    """A fused ReLU is lost, or one is added."""
    from ai_edge_litert.schema_py_generated import ActivationFunctionType as Activation

    fusing = _operators(model, *_PRODUCTS)
    if not fusing:
        return None
    operator = fusing[rng.integers(len(fusing))]
    options = operator.builtinOptions
    had_none = options.fusedActivationFunction == Activation.NONE
    options.fusedActivationFunction = Activation.RELU if had_none else Activation.NONE
    return _output(model, operator)


def zeroed_scale(model: Any, rng: np.random.Generator) -> str | None:
    """A constant factor, such as a layer scale or a norm's weight, is zero."""
    scaled = [
        operator
        for operator in _operators(model, "MUL")
        if any(_constant(model, index) is not None for index in operator.inputs)
    ]
    if not scaled:
        return None
    operator = scaled[rng.integers(len(scaled))]
    inputs = list(operator.inputs)
    position = next(p for p, index in enumerate(inputs) if _constant(model, index) is not None)
    original = _graph(model).tensors[inputs[position]]
    inputs[position] = _add_constant(model, original, np.zeros_like(_array(model, original)))
    operator.inputs = inputs
    return _output(model, operator)


def wrong_activation_scale(model: Any, rng: np.random.Generator) -> str | None:
    """The range of a quantized activation is four times too narrow."""
    tensor = _quantized_activation(model, rng)
    if tensor is None:
        return None
    tensor.quantization.scale = np.asarray(tensor.quantization.scale, np.float32) / 4
    return str(tensor.name.decode())


def wrong_weight_scale(model: Any, rng: np.random.Generator) -> str | None:
    """Half of the channels of a quantized weight are scaled by 1.5."""
    operator, tensor = _weighted(model, rng, *_PRODUCTS)
    if operator is None or tensor.type != _INT8:
        return None
    scales = np.array(tensor.quantization.scale, np.float32)
    scales[: max(len(scales) // 2, 1)] *= 1.5
    tensor.quantization.scale = scales
    return _output(model, operator)


FLOAT_KINDS: tuple[Mutation, ...] = (
    swapped_weights,
    dropped_bias,
    transposed_kernel,
    changed_pooling,
    changed_activation,
    zeroed_scale,
    changed_padding,
    swapped_channels,
    swapped_entries,
)
INT8_KINDS: tuple[Mutation, ...] = (
    wrong_activation_scale,
    wrong_weight_scale,
    *FLOAT_KINDS,
)


def _graph(model: Any) -> Any:
    return flatbuffer.subgraph_of(model, flatbuffer.FEATURES)


def _operators(model: Any, *kinds: str) -> list[Any]:
    return [op for op in _graph(model).operators if flatbuffer.operator_name(model, op) in kinds]


def _output(model: Any, operator: Any) -> str:
    return str(_graph(model).tensors[operator.outputs[0]].name.decode())


def _constant(model: Any, index: int) -> Any:
    """The tensor of that index if it has content, else None."""
    tensor = _graph(model).tensors[index]
    data = model.buffers[tensor.buffer].data
    return None if data is None or not len(data) else tensor


def _weighted(model: Any, rng: np.random.Generator, *kinds: str) -> tuple[Any, Any]:
    """One of the operations with constant weights, and these; None and None where there is none."""
    found = [
        (operator, tensor)
        for operator in _operators(model, *kinds)
        if (tensor := _constant(model, operator.inputs[1])) is not None and len(tensor.shape) > 1
    ]
    return found[rng.integers(len(found))] if found else (None, None)


def _quantized_activation(model: Any, rng: np.random.Generator) -> Any:
    graph = _graph(model)
    outputs = [graph.tensors[operator.outputs[0]] for operator in _operators(model, *_PRODUCTS, "QUANTIZE")]
    found = [tensor for tensor in outputs if tensor.type == _INT8]
    return found[rng.integers(len(found))] if found else None


def _replace_operation(model: Any, rng: np.random.Generator, kind: str, by: str) -> str | None:
    from ai_edge_litert import schema_py_generated as schema

    found = _operators(model, kind)
    if not found:
        return None
    operator = found[rng.integers(len(found))]
    code = getattr(schema.BuiltinOperator, by)
    model.operatorCodes.append(schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=1))
    operator.opcodeIndex = len(model.operatorCodes) - 1
    return _output(model, operator)


def _dtype(tensor: Any) -> str:
    return {_FLOAT32: "<f4", _INT32: "<i4", _INT8: "<i1"}[tensor.type]


def _array(model: Any, tensor: Any) -> np.ndarray:
    data = np.asarray(model.buffers[tensor.buffer].data)
    return data.view(_dtype(tensor)).reshape(list(tensor.shape)).copy()


def _store(model: Any, tensor: Any, array: np.ndarray) -> None:
    """Give a tensor content of its own: the converter lets equal constants share a buffer."""
    from ai_edge_litert import schema_py_generated as schema

    content = np.ascontiguousarray(array).astype(_dtype(tensor)).tobytes()
    model.buffers.append(schema.BufferT(data=np.frombuffer(content, np.uint8)))
    tensor.buffer = len(model.buffers) - 1


def _add_constant(model: Any, like: Any, array: np.ndarray) -> int:
    """A new constant with the type and quantization of another; returns its index."""
    from ai_edge_litert import schema_py_generated as schema

    tensor = schema.TensorT(
        shape=list(like.shape), type=like.type, buffer=0, name=like.name + b"_changed", quantization=like.quantization
    )
    _store(model, tensor, array)
    graph = _graph(model)
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1
