"""The tensors of TFLite files against PyTorch's, and those of quantized files against the float32 file's.

Float32: a tensor's name holds the modules that it came from, so the tensors that PyTorch computes in them, or in the
modules around them, are its candidates, in either layout. What the converter alone computes has no counterpart. A
tensor has departed when it has none and this shows in the output: some way from it to the output meets no tensor that agrees.

Quantized: errors of whole steps are normal and add up, so each operation is repeated in float32 on the very inputs that
it had. Then only its own rounding is left, its weights' and its result's, and a wrong weight, scale or bias shows where it
is. Int8 and float16 weights are compared with the float32 file's besides: a single wrong one drowns in the rounding of
the others.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from converters.isolate import opened
from converters.layers import (
    FLOAT_LIMIT,
    HALF_LIMIT,
    Layer,
    LayerReport,
    cosine_distance,
    difference,
    half_rounding,
    input_layer,
)
from converters.tflite_tensors import BackboneRun, Feeds, Operation, open_backbone, open_operations
from converters.torch_trace import ROOT, TracedTensor

ROUNDING_LIMIT = 0.06
"""Root mean square of what an operation of a quantized file is off by beyond one step, where its result is in range, as a
share of the result's, in the worst channel. Measured on clean files of five families: 0.035 at most, mostly below 0.01."""
CLIPPING_LIMIT = 0.15
"""The same over all channels, with values outside the range that calibration found, where they are more than
`CLIPPED_SHARE`; measured as above: 0.065 at most."""
CLIPPED_SHARE = 0.02
"""Of a result's values: trained transformers have rare ones far outside of what calibration saw, which clipping bounds
without harm. A range that is wrong clips more of them: an EfficientFormer trained on CIFAR-10 clips 1 % of a result by up
to 0.9 of its range, and answers as float32 does."""
WEIGHT_LIMIT = 0.51
"""Steps by which a symmetric int8 weight may differ from the float32 file's, clipped to its range: half a step is rounding
to the nearest, as our quantizer does. One that learns how to round needs a whole step."""
_WEIGHT_CODE = 127
Head = Callable[[np.ndarray], np.ndarray]
_QUANTIZER_SUFFIX = re.compile(r"(_quantized|_dequant|_requantized)+$")
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


def compare_float(path: Path, traced: Sequence[TracedTensor], images: np.ndarray, *, artifact: str) -> LayerReport:
    """Compare a float TFLite file with PyTorch.

    Args:
        path: has the signature `features`.
        traced: what `torch_trace.trace` gave for the same frames.
        images: float32 [N, H, W, C], as the artifact's own record has them pre-processed.
        artifact: its name in the report.
    """
    with opened(open_backbone, path) as backbone:
        run: BackboneRun = backbone(images)
    matches = {index: _best_match(run, index, traced) for index in run.values}
    departed = _departed(run, {index for index, match in matches.items() if match is None or match[1] > FLOAT_LIMIT})
    layers = [input_layer(images, traced[0].value.reshape(images.shape))]
    for operation, index in _outputs(run):
        tensor, error, distance = matches[index] or (None, None, None)
        if index not in departed and (error is None or error > FLOAT_LIMIT):
            tensor = error = distance = None
        layers.append(
            Layer(
                name=run.names[index],
                module=tensor.module if tensor else module_of(run.names[index]),
                kind=operation.kind,
                error=error,
                cosine_distance=distance,
                own=(2.0 if error is None else error / FLOAT_LIMIT) if index in departed else 0.0,
            )
        )
    return LayerReport(artifact=artifact, reference="PyTorch", layers=tuple(layers))


def compare_quantized(
    path: Path,
    float_path: Path,
    images: np.ndarray,
    *,
    artifact: str,
    expected_images: np.ndarray,
    head: Head | None = None,
) -> LayerReport:
    """Compare a quantized TFLite file with the float32 file that it was made from.

    Args:
        path: has the signature `features`, or `serving_default` with a head behind the features.
        float_path: has the signature `features`.
        images: float32 [N, H, W, C], as the artifact's own record has them pre-processed.
        artifact: its name in the report.
        expected_images: the same frames as the model was trained on them.
        head: what the head, if there is one, should make of features [N, D].
    """
    with opened(open_backbone, path) as backbone:
        run: BackboneRun = backbone(images)
    with opened(open_backbone, float_path) as backbone:
        reference: BackboneRun = backbone(expected_images)
    places = {reference.names[operation.outputs[0]]: number for number, operation in enumerate(reference.operations)}
    feeds: list[Feeds] = [{} for _ in reference.operations]
    for operation in run.operations:
        number = places.get(run.names[operation.outputs[0]])
        if number is not None:
            feeds[number] = _feeds(run, operation)
    with opened(open_operations, float_path) as operations:
        repeated = operations(feeds)
    layers = [input_layer(images, expected_images)]
    for operation, index in _outputs(run):
        number = places.get(run.names[operation.outputs[0]])
        expected = _expected(run, operation, index, None if number is None else repeated[number], head)
        base = _base(run, index, reference)
        values = run.values[index]
        layers.append(
            Layer(
                name=run.names[index],
                module=module_of(run.names[index]),
                kind=operation.kind,
                error=None if base is None else difference(values, base),
                cosine_distance=None if base is None else cosine_distance(values, base),
                own=max(
                    0.0 if expected is None else _own_error(run, operation, index, expected),
                    0.0 if number is None else _weight_error(run, operation, reference, reference.operations[number]),
                ),
            )
        )
    return LayerReport(artifact=artifact, reference="the float32 file", layers=tuple(layers))


def scopes_of(name: str) -> tuple[str, ...]:
    """The modules that a tensor's name tells, as `package.Class_attribute/...`: two for a fused operation, or none."""
    parts = [re.sub(r";\d*$", "", part) for part in _QUANTIZER_SUFFIX.sub("", name).split(";;")]
    return tuple(part for part in parts if part.startswith(ROOT))


def module_of(name: str) -> str:
    """The attributes in a tensor's name, dotted: how the module is reached, without what was only iterated over."""
    segments = (scopes_of(name) or ("",))[0].split("/")[1:]
    return ".".join(segment.rpartition(".")[2].partition("_")[2] for segment in segments)


def _outputs(run: BackboneRun) -> Iterator[tuple[Operation, int]]:
    return ((operation, index) for operation in run.operations for index in operation.outputs)


def _best_match(
    run: BackboneRun, index: int, traced: Sequence[TracedTensor]
) -> tuple[TracedTensor, float, float] | None:
    """The tensor of PyTorch that is nearest, with its error and cosine distance; None where none has this size."""
    values, scopes = run.values[index], scopes_of(run.names[index]) or ("",)
    best = None
    for tensor in traced:
        if tensor.value.size != values.size or not any(_is_within(scope, tensor.scope) for scope in scopes):
            continue
        for reference in _layouts(tensor.value, values.shape):
            error = difference(values, reference)
            if best is None or error < best[1]:
                best = (tensor, error, cosine_distance(values, reference))
    return best


def _is_within(scope: str, outer: str) -> bool:
    """Whether a scope is another one or inside it; the graph's output, whose name tells none, may be of any."""
    return not scope or f"{scope}/".startswith(f"{outer}/")


def _layouts(value: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A tensor [N, ...] in the layouts that come to `shape`: as it is, channels moved, heads or matrices swapped."""
    yield value.reshape(shape)
    squeezed = value.reshape(len(value), *(size for size in value.shape[1:] if size > 1))
    target = tuple(size for size in shape[1:] if size > 1)
    axes = squeezed.ndim
    if axes < 3:
        return
    moved = [np.moveaxis(squeezed, 1, -1), np.moveaxis(squeezed, -1, 1)]
    if axes > 3:
        moved += [np.swapaxes(squeezed, 1, 2), np.swapaxes(squeezed, -1, -2)]
    for candidate in moved:
        if candidate.shape[1:] == target:
            yield candidate.reshape(shape)


def _departed(run: BackboneRun, unmatched: set[int]) -> set[int]:
    """Tensors without a counterpart from which a way leads to the output through none that has one."""
    consumers: dict[int, list[int]] = {}
    for operation in run.operations:
        for index in operation.inputs:
            consumers.setdefault(index, []).extend(operation.outputs)
    departed: set[int] = set()
    for operation in reversed(run.operations):
        for index in operation.outputs:
            following = consumers.get(index, [])
            if index in unmatched and (not following or departed.intersection(following)):
                departed.add(index)
    return departed


def _feeds(run: BackboneRun, operation: Operation) -> Feeds:
    return {position: run.values[index] for position, index in enumerate(operation.inputs) if index in run.values}


def _expected(
    run: BackboneRun, operation: Operation, index: int, repeated: list[np.ndarray] | None, head: Head | None
) -> np.ndarray | None:
    """What float32 makes of this operation's own inputs; None where the float32 file has no such operation."""
    shape = run.values[index].shape
    if repeated is not None:
        return repeated[operation.outputs.index(index)].reshape(shape)
    if operation.kind in _CONVERSIONS and operation.inputs[0] in run.values:
        return run.values[operation.inputs[0]].reshape(shape)
    if head and operation.kind == "FULLY_CONNECTED":
        features = run.values[operation.inputs[0]]
        return head(features.reshape(len(features), -1)).reshape(shape)
    return None


def _base(run: BackboneRun, index: int, reference: BackboneRun) -> np.ndarray | None:
    """The float32 file's tensor of this name."""
    name = _QUANTIZER_SUFFIX.sub("", run.names[index])
    for candidate in reference.values:
        if reference.names[candidate] == name and reference.values[candidate].size == run.values[index].size:
            return reference.values[candidate].reshape(run.values[index].shape)
    return None


def _bounds(run: BackboneRun, operation: Operation, index: int) -> tuple[float, float] | None:
    """The range of an operation's result; boundless where only its weights are quantized, None where nothing is."""
    has_codes = any(source in run.weight_steps for source in operation.inputs)
    return run.ranges.get(index, (-np.inf, np.inf) if has_codes else None)


def _weight_error(run: BackboneRun, operation: Operation, reference: BackboneRun, original: Operation) -> float:
    """How far an operation's int8 or float16 constants are from the float32 file's, as a multiple of what rounding allows."""
    worst = 0.0
    for index, twin in zip(operation.inputs, original.inputs, strict=False):
        if index in run.halves and twin in reference.weights:
            widened, expected = run.values[index][0], reference.weights[twin]
            worst = max(worst, half_rounding(widened, expected.reshape(widened.shape)))
        if index in run.weight_steps and twin in reference.weights:
            steps = np.where(run.weight_steps[index] > 0, run.weight_steps[index], 1.0)
            codes = run.weights[index] / steps
            expected = reference.weights[twin].reshape(codes.shape) / steps
            distance = np.abs(codes - expected.clip(-_WEIGHT_CODE, _WEIGHT_CODE))
            worst = max(worst, float(distance.max()) / WEIGHT_LIMIT)
    return worst


def _own_error(run: BackboneRun, operation: Operation, index: int, expected: np.ndarray) -> float:
    """How far an operation's result is from float32's, as a multiple of what its precision allows."""
    values, bounds = run.values[index], _bounds(run, operation, index)
    if bounds is None:
        return difference(values, expected) / (HALF_LIMIT if run.halves.intersection(operation.inputs) else FLOAT_LIMIT)
    low, high = bounds
    spread = max(float(expected.max()), 0.0) - min(float(expected.min()), 0.0)
    step = min(high - low, 2 * spread) / 255  # a range much too wide must not excuse its own coarseness
    excess = np.maximum(np.abs(values - expected) - step, 0.0)
    is_in_range = (expected >= low) & (expected <= high)
    others = tuple(range(values.ndim - 1))  # a single wrong weight shows in one channel, the last axis
    sizes = np.maximum(_root_mean_square(expected, others), step)
    rounding = float(
        (_root_mean_square(np.where(is_in_range, excess, 0.0), others) / np.where(sizes, sizes, 1.0)).max()
    )
    return max(rounding / ROUNDING_LIMIT, _clipping(excess, expected, is_in_range) / CLIPPING_LIMIT)


def _clipping(excess: np.ndarray, expected: np.ndarray, is_in_range: np.ndarray) -> float:
    """What values outside the range cost, as a share of the result; nothing where they are few."""
    if 1 - is_in_range.mean() <= CLIPPED_SHARE:
        return 0.0
    return float(_root_mean_square(excess, None)) / (float(_root_mean_square(expected, None)) or 1.0)


def _root_mean_square(values: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return np.sqrt(np.asarray((values.astype(np.float64) ** 2).mean(axis=axes)))
