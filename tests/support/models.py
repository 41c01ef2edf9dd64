"""What tests of models share: a look into an exported graph."""

import torch
from torch import Tensor, nn


def ranks_and_operations(model: nn.Module, images_nchw: Tensor) -> tuple[set[int], set[str]]:
    """The ranks of all tensors in a model's exported graph, and its operations, such as `aten.bmm.default`."""
    nodes = torch.export.export(model, (images_nchw,)).run_decompositions({}).graph.nodes
    values = [node.meta.get("val") for node in nodes]
    names = {str(node.target) for node in nodes if node.op == "call_function"}
    return {value.ndim for value in values if isinstance(value, Tensor)}, names
