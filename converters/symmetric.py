"""Ranges around zero for what matrix products take on the right: XNNPACK runs an int8 BATCH_MATMUL only then.

Its right operand needs the zero point 0. Operations that only move values give their output the range of their input, so
the range is set where the values come from. `bench/conversion_speed.py` measures what that gains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.flatbuffer import FEATURES, operator_name, read_model, subgraph_of

PRODUCT = "BATCH_MATMUL"
_MOVES = ("RESHAPE", "TRANSPOSE", "SLICE")
_MOST = 127  # of a symmetric int8 value: -128 is never used

Ranges = dict[str, Any]
"""What a calibration found: `{tensor name: {"min": array, "max": array}}`."""


def right_operands(path: Path) -> frozenset[str]:
    """Names of the tensors that are a matrix product's right operand, or become one by being moved only."""
    model = read_model(path)
    graph = subgraph_of(model, FEATURES)
    producers = {int(tensor): operator for operator in graph.operators for tensor in operator.outputs}
    todo = [int(op.inputs[1]) for op in graph.operators if operator_name(model, op) == PRODUCT]
    found: set[int] = set()
    while todo:
        tensor = todo.pop()
        found.add(tensor)
        producer = producers.get(tensor)
        if producer is not None and operator_name(model, producer) in _MOVES:
            todo.append(int(producer.inputs[0]))
    return frozenset(graph.tensors[tensor].name.decode() for tensor in found)


def products_with_constants(path: Path) -> tuple[str, ...]:
    """Names of the outputs of matrix products with a constant, such as talking heads: XNNPACK has no int8 form of them."""
    model = read_model(path)
    graph = subgraph_of(model, FEATURES)
    return tuple(
        graph.tensors[op.outputs[0]].name.decode()
        for op in graph.operators
        if operator_name(model, op) == PRODUCT
        and any(model.buffers[graph.tensors[tensor].buffer].data is not None for tensor in op.inputs[:2])
    )


def with_symmetric(ranges: Mapping[str, Any], names: frozenset[str]) -> Ranges:
    """The ranges, those of the named tensors widened to be symmetric in int8: a scale, and the zero point 0."""
    return {name: _widened(found) if name in names else found for name, found in ranges.items()}


def _widened(found: Mapping[str, Any]) -> dict[str, Any]:
    largest = max(float(np.abs(found[end]).max()) for end in ("min", "max"))
    scale = np.float64(np.float32(largest / _MOST))
    return {"min": np.full_like(found["min"], -(_MOST + 1) * scale), "max": np.full_like(found["max"], _MOST * scale)}
