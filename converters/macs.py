"""Multiply-accumulates of a TFLite graph by the type that its kernels compute in."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from converters.flatbuffer import operator_name, read_model

CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
PRODUCTS = ("FULLY_CONNECTED", "BATCH_MATMUL")


def macs_by_type(path: Path, *, subgraph: int = 0) -> Counter[str]:
    """Count multiply-accumulates of convolutions and matrix products: `{"INT8": 1290000000, "FLOAT32": 240000}`.

    The type is that of the second operand: an operation with int8 weights and float activations quantizes these as it
    runs, and multiplies integers too.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = read_model(path)
    graph = model.subgraphs[subgraph]
    counts: Counter[str] = Counter()
    for operator in graph.operators:
        name = operator_name(model, operator)
        if name in (*CONVOLUTIONS, *PRODUCTS):
            second = graph.tensors[operator.inputs[1]]
            counts[flatbuffer_utils.type_to_name(second.type)] += _macs(graph, operator, name)
    return counts


def _macs(graph: Any, operator: Any, name: str) -> int:
    first, second = (_shape(graph, index) for index in operator.inputs[:2])
    outputs = prod(_shape(graph, operator.outputs[0]))
    if name == "CONV_2D":
        return outputs * prod(second[1:])  # weights [O, h, w, I / groups]
    if name == "DEPTHWISE_CONV_2D":
        return outputs * prod(second[1:3])  # weights [1, h, w, O]
    if name == "FULLY_CONNECTED":
        return outputs * second[-1]  # weights [O, I]
    return outputs * (first[-2] if operator.builtinOptions.adjX else first[-1])


def _shape(graph: Any, index: int) -> list[int]:
    return [int(size) for size in graph.tensors[index].shape]
