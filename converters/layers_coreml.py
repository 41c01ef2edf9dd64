"""The tensors of a Core ML package against PyTorch's, and its operations against those of a float32 package.

coremltools keeps the names of PyTorch's nodes, so tensors and operations find their counterparts by name. Errors add up
along the depth, so each operation is repeated by the float32 package, which is made from the trusted model, on the very
inputs that it had: then only the rounding of its own weights and activations is left. What the converter put in between,
transpositions and casts, has no counterpart, and shows in what follows it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.isolate import opened
from converters.layers import HALF_LIMIT, Layer, LayerReport, cosine_distance, difference, half_rounding, input_layer
from converters.torch_trace import TracedTensor

QUANTIZED_LIMIT = 0.06
"""Root mean square of what an operation is off by where weights are int8 or a palette, as a share of the result's."""
_SUFFIX = re.compile(r"(_cast)?(_fp16|_fp32)?(_quantized|_dequantized)?$")
_SETTING = re.compile(r"_(strides|pad|pad_type|dilations|groups)_\d+$")
"""Behind a node's name: a setting of the convolution that it became."""
_FIRST = "_0"
"""What the cast to float16 puts behind the first of several equal names, `linear` and `linear_1`."""
_MOVES = frozenset(
    {"transpose", "cast", "reshape", "split", "concat", "expand_dims", "squeeze", "quantize", "dequantize"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramLayer:
    """One operation's result over N images, and what float32 makes of the same inputs.

    Args:
        name: of PyTorch's node.
        parameters: names of its constants, as `p_model_PATH_weight` or `conv2d_1_strides_0`.
        kind: of the operation.
        values: float32 [N, ...].
        expected: the same from the float32 package; None where that has no such operation.
        weights_own: how far its constants are from the float32 package's, as a multiple of what rounding to float16
            allows; 0 where they are held in another form.
    """

    name: str
    parameters: tuple[str, ...]
    kind: str
    values: np.ndarray
    expected: np.ndarray | None
    weights_own: float


def compare_package(
    path: Path,
    reference: Path,
    traced: Sequence[TracedTensor],
    images: np.ndarray,
    *,
    artifact: str,
    is_half: bool,
    expected_images: np.ndarray,
) -> LayerReport:
    """Compare a package with PyTorch and with a float32 package of the same model.

    Args:
        path: the package.
        reference: a float32 package from the trusted model, converted the same way.
        traced: what `torch_trace.trace` gave for `expected_images`.
        images: float32 [N, H, W, C], as the artifact's own record has them pre-processed.
        artifact: its name in the report.
        is_half: weights are float16; else they are int8 or a palette.
        expected_images: the same frames as the model was trained on them.
    """
    with opened(open_programs, path) as programs:
        found: list[ProgramLayer] = programs(reference, images)
    nodes = {tensor.name: tensor for tensor in traced}
    modules = {f"p_model_{tensor.module.replace('.', '_')}_": tensor.module for tensor in traced if tensor.module}
    layers = [input_layer(images, expected_images)]
    for layer in found:
        node = nodes.get(layer.name) or nodes.get(layer.name.removesuffix(_FIRST))
        is_same = node is not None and layer.kind not in _MOVES and node.value.size == layer.values.size
        base = node.value.reshape(layer.values.shape) if node and is_same else None
        own = 0.0 if layer.expected is None else _own_error(layer.values, layer.expected, is_half=is_half)
        layers.append(
            Layer(
                name=layer.name,
                module=node.module if node else _owner(layer, modules, nodes),
                kind=layer.kind,
                error=None if base is None else difference(layer.values, base),
                cosine_distance=None if base is None else cosine_distance(layer.values, base),
                own=max(own, layer.weights_own if is_half else 0.0),
            )
        )
    return LayerReport(artifact=artifact, reference="PyTorch", layers=tuple(layers))


def open_programs(path: Path) -> Any:
    """Load a package; what is returned takes the float32 package and images [N, H, W, C]."""
    from converters.mil import MilProgram

    program = MilProgram(path)

    def run(reference_path: Path, images: np.ndarray) -> list[ProgramLayer]:
        reference = MilProgram(reference_path)
        twins = {plain(op.outputs[0].name): op for op in reference.operations if op.op_type not in _MOVES}
        aliases = _outputs_by_source(program)
        runs = [program.run_all({"images": image[None]}) for image in images]
        layers = []
        for operation in program.operations:
            name = plain(operation.outputs[0].name)
            twin = twins.get(aliases.get(name, name)) or twins.get(name.removesuffix(_FIRST))
            if operation.outputs[0].name not in runs[0] or operation.op_type.startswith("constexpr_"):
                continue
            values = np.stack([run[operation.outputs[0].name] for run in runs])
            expected = None
            if twin is not None and twin.op_type == operation.op_type:
                expected = _repeated(reference, twin, operation, runs)
            is_repeated = expected is not None and expected.shape == values.shape
            layers.append(
                ProgramLayer(
                    name=name,
                    parameters=_constants(operation),
                    kind=operation.op_type,
                    values=values,
                    expected=expected if is_repeated else None,
                    weights_own=_weights_error(operation, twin) if is_repeated else 0.0,
                )
            )
        return layers

    return run


def _owner(layer: ProgramLayer, modules: Mapping[str, str], nodes: Mapping[str, TracedTensor]) -> str:
    """The module that an operation without a counterpart came from, as the names of its constants tell."""
    for name in layer.parameters:
        node = nodes.get(_SETTING.sub("", name))
        found = node.module if node else next((modules[start] for start in modules if name.startswith(start)), "")
        if found:
            return found
    return ""


def _constants(operation: Any) -> tuple[str, ...]:
    items = [item for item in operation.inputs.values() if item is not None and not isinstance(item, list | tuple)]
    return tuple(item.name for item in items if item.val is not None)


def plain(name: str) -> str:
    """The name of PyTorch's node in the name of a MIL tensor."""
    return _SUFFIX.sub("", name)


def _outputs_by_source(program: Any) -> dict[str, str]:
    """The output that each tensor becomes by a cast alone: a float32 package, which needs none, gives it that name."""
    casts = [operation for operation in program.operations if operation.op_type == "cast"]
    return {plain(cast.inputs["x"].name): cast.outputs[0].name for cast in casts}


def _repeated(reference: Any, twin: Any, operation: Any, runs: Sequence[dict[str, np.ndarray]]) -> np.ndarray | None:
    """What the float32 package's operation makes of the inputs that the package's had; None where some are missing."""
    moving = {
        key: item.name
        for key, item in twin.inputs.items()
        if item is not None and not isinstance(item, list | tuple) and item.val is None
    }
    sources = {key: operation.inputs.get(key) for key in moving}
    if not moving or any(source is None or isinstance(source, list | tuple) for source in sources.values()):
        return None
    if any(source.name not in runs[0] for source in sources.values()):
        return None
    if any(tuple(source.shape) != tuple(twin.inputs[key].shape) for key, source in sources.items()):
        return None  # of the same name by chance
    results = [reference.run_alone(twin, {key: run[source.name] for key, source in sources.items()})[0] for run in runs]
    return np.stack(results)


def _weights_error(operation: Any, twin: Any) -> float:
    """How far constants are from the float32 package's, as a multiple of what rounding to float16 allows."""
    worst = 0.0
    for key, item in twin.inputs.items():
        own = operation.inputs.get(key)
        if any(var is None or isinstance(var, list | tuple) or var.val is None for var in (item, own)):
            continue
        expected, found = np.asarray(item.val), np.asarray(own.val)
        if expected.dtype.kind != "f" or expected.shape != found.shape or not expected.size:
            continue
        worst = max(worst, half_rounding(found, expected))
    return worst


def _own_error(values: np.ndarray, expected: np.ndarray, *, is_half: bool) -> float:
    """How far a result is from float32's, as a multiple of what its precision allows."""
    if is_half or not np.isfinite(values).all():
        return difference(values, expected) / HALF_LIMIT
    size = float(np.sqrt((expected.astype(np.float64) ** 2).mean())) or 1.0
    return float(np.sqrt(((values - expected).astype(np.float64) ** 2).mean())) / size / QUANTIZED_LIMIT
