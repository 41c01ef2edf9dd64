"""Every tensor that PyTorch computes on the way from images to features, with the module it belongs to.

The deploy form is exported as converters export it and its graph is run node by node. A node carries the modules that
were being called: litert-torch writes them into tensor names, coremltools keeps the nodes' own names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from converters.errors import ConversionError
from converters.prepare import DeployClassifier, evaluating
from converters.quiet import quiet

ROOT = "converters.prepare.DeployFeatures"
NORMALIZED = "/normalized"
"""Behind the name of a layer norm: its result before weight and bias, which a converter folds into what follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTensor:
    """One tensor over all images.

    Args:
        name: of the graph's node, as in Core ML programs.
        scope: the modules being called, as litert-torch writes them: `package.Class_attribute/...`.
        module: dotted path of the innermost module, for people; empty for the model itself.
        value: float32 [N, ...], one image each.
    """

    name: str
    scope: str
    module: str
    value: np.ndarray


def trace(deployed: nn.Module, images: np.ndarray) -> tuple[TracedTensor, ...]:
    """Run the deploy form over images float32 [N, H, W, C]; tensors in the order they are computed.

    Raises:
        ConversionError: torch.export refused the model.
    """
    batches = torch.from_numpy(images).split(1)
    with evaluating(deployed), quiet(), torch.no_grad():
        try:
            program = torch.export.export(DeployClassifier(deployed).eval(), (batches[0],)).run_decompositions({})
        except Exception as error:  # torch.export raises many unrelated types
            raise ConversionError(f"torch.export cannot trace {type(deployed).__name__}: {error}") from error
        module = program.module()
        runs = [_run(module, batch) for batch in batches]
    nodes = {node.name: node for node in module.graph.nodes}
    return tuple(
        TracedTensor(
            name=name,
            scope=_scope(nodes[name.removesuffix(NORMALIZED)]),
            module=_path(nodes[name.removesuffix(NORMALIZED)]),
            value=np.concatenate([run[name][None] for run in runs]),
        )
        for name in runs[0]
    )


class _Recorder(fx.Interpreter):
    """Keep a copy of each floating-point tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, np.ndarray] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_function", "placeholder") and isinstance(result, Tensor) and result.is_floating_point():
            self.values[n.name] = result.detach().numpy().copy()
        if n.target == torch.ops.aten.layer_norm.default:
            arguments, _ = self.fetch_args_kwargs_from_env(n)  # x, shape, then weight, bias and eps as far as given
            plain = nn.functional.layer_norm(*arguments[:2], None, None, *arguments[4:5])
            self.values[n.name + NORMALIZED] = plain.numpy()
        return result


def _run(module: fx.GraphModule, images: Tensor) -> dict[str, np.ndarray]:
    recorder = _Recorder(module)
    recorder.run(images)
    return recorder.values


def _stack(node: fx.Node) -> Sequence[tuple[str, str]]:
    return list(node.meta.get("nn_module_stack", {}).values())


def _scope(node: fx.Node) -> str:
    segments = [f"{kind}_{path.rpartition('.')[2]}" for path, kind in _stack(node)[1:]]
    return "/".join([ROOT, *segments])


def _path(node: fx.Node) -> str:
    stack = _stack(node)
    return stack[-1][0].removeprefix("model.") if stack else ""
