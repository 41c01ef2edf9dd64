"""PyTorch to ONNX, the first half of the second route (`converters.second_route`).

Channel-first, as ONNX has images: onnx2tf moves the channels last itself, and so gives the input that our own files
have. Opset 20 is the first that knows GELU as one operation; below, its parts would become Flex operations.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from converters.errors import ConversionError, RefusedModelError
from converters.prepare import evaluating, feature_dim
from converters.quiet import quiet
from device.contract.files import write_atomic

OPSET = 20
FEATURES, LOGITS = "features", "logits"


class _Answers(nn.Module):
    """images [1, C, H, W] to features [1, D], and to logits [1, K] where they are wanted."""

    def __init__(self, model: nn.Module, *, with_logits: bool) -> None:
        super().__init__()
        self.model, self.with_logits = model, with_logits

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(images)
        return (features, self.model.head(features)) if self.with_logits else (features,)


def export_onnx(
    model: nn.Module, input_shape: tuple[int, int, int, int], path: Path, *, with_logits: bool = True
) -> Path:
    """Write a model as ONNX: `images` float32 [1, C, H, W] to `features` [1, D] and `logits` [1, K], all static.

    Args:
        model: a model's `deploy()`; its mode is restored.
        input_shape: (1, H, W, C), as everywhere in converters.
        path: where to write; one file, weights included.
        with_logits: whether the head is exported too.

    Raises:
        ConversionError: the model does not fit, or the packages of the extra `onnx` are missing.
        RefusedModelError: PyTorch's exporter does not take it.
    """
    try:
        import onnxscript  # noqa: F401  # torch.onnx asks for it late, in the middle of an export
    except ImportError as error:
        raise ConversionError(
            f"ONNX export needs {error.name}, which is not installed; run: pip install 'fieldvit[onnx]'"
        ) from error
    feature_dim(model, input_shape)
    _, height, width, channels = input_shape
    names = [FEATURES, LOGITS] if with_logits else [FEATURES]
    with evaluating(model), quiet():
        try:
            program = torch.onnx.export(
                _Answers(model, with_logits=with_logits).eval(),
                (torch.zeros(1, channels, height, width),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=names,
                verbose=False,
            )
            assert program is not None
        except Exception as error:  # torch.export and onnxscript raise many unrelated types
            raise RefusedModelError(f"torch.onnx cannot export {type(model).__name__}: {error}") from error
        graph = flatten_layer_norms(program.model_proto)
        write_atomic(path, graph.SerializeToString())
    return path


def flatten_layer_norms(model: Any) -> Any:
    """Rewrite every LayerNormalization over several axes as one over a single, flattened axis; exact.

    onnx2tf normalizes over the first of the axes alone, and fails on the shape of the scale. MobileViTv2's norms, which
    are group norms with one group, are exported in this form.

    Args:
        model: an ONNX ModelProto with static shapes; changed in place, and returned.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.value_info}
    nodes = []
    for node in graph.node:
        axes = constants[node.input[1]].shape if node.op_type == "LayerNormalization" else ()
        if len(axes) < 2:
            nodes.append(node)
            continue
        (source, *weights), (target,) = node.input, node.output
        flat, back, inside, normed = (f"{target}_{name}" for name in ("flat", "back", "inside", "normed"))
        for name, size in ((flat, [-1, math.prod(axes)]), (back, shapes[source])):
            graph.initializer.append(numpy_helper.from_array(np.array(size, np.int64), name))
        for name in weights:
            graph.initializer.append(numpy_helper.from_array(constants[name].reshape(-1), f"{target}_{name}"))
        epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
        names = [inside, *(f"{target}_{name}" for name in weights)]
        nodes += [
            helper.make_node("Reshape", [source, flat], [inside]),
            helper.make_node("LayerNormalization", names, [normed], name=node.name, axis=-1, epsilon=epsilon),
            helper.make_node("Reshape", [normed, back], [target]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return model
