"""Core ML with int8 weights and int8 activations (W8A8) at ranges of our own, made and checked on Linux.

Each convolution and linear layer gets a quantize-dequantize pair before it (asymmetric, one scale) and int8 weights
(symmetric, a scale per output channel). They stand in the exported PyTorch graph as `torch.ops.quantized_decomposed`,
which coremltools turns into `quantize`, `dequantize` and `constexpr_affine_dequantize`: what computes in int8 on the
Neural Engine of iOS 17. Everything else stays float16, and so does the head: a board puts its own in its place, it is
small, and its rounding goes straight into the logits. A layer that sees only weights is left to the converter to fold.

What coremltools does on the way can change the numbers. `REMOVED_PASS` rewrites scales around additions; folding a
layer scale or a batch norm would change weights, if they were not constants of int8 already. So the saved package is
read back: each layer in it must have exactly the scale, zero point and int8 weights that were put in.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from converters import coreml
from converters.activation_ranges import (
    QMAX,
    QMIN,
    AffineInt8,
    calibrate,
    half_scales,
    layers_that_see_images,
    require_images,
)
from converters.errors import ConversionError
from converters.mil import load_function
from converters.prepare import evaluating, feature_dim

REMOVED_PASS = "common::distributive_quantized_binary_op_scale_normalization"
FLOAT_PART = "head"
_OPS = torch.ops.quantized_decomposed


@dataclass(frozen=True, eq=False, slots=True)
class Int8Layer:
    """What one layer of a quantized model holds: its input's codes and its weights' codes and scales."""

    name: str
    activation: AffineInt8
    weight_scales: np.ndarray  # float32 [O]
    weight_codes: np.ndarray  # int8 [O, ...]

    def has_the_numbers_of(self, other: "Int8Layer") -> bool:
        """Whether every scale, zero point and weight is the same."""
        return (
            self.activation == other.activation
            and np.array_equal(self.weight_scales, other.weight_scales)
            and np.array_equal(self.weight_codes, other.weight_codes)
        )


class QuantizedLayer(nn.Module):
    """A convolution or linear layer that rounds its input and weights to int8; runs in PyTorch as it does in Core ML."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, activation: AffineInt8) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation
        codes, scales = quantize_per_channel(layer.weight.detach().numpy())
        self.register_buffer("codes", torch.from_numpy(codes))
        self.register_buffer("scales", torch.from_numpy(scales))
        self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        how = (self.activation.scale, self.activation.zero_point, QMIN, QMAX, torch.int8)
        x = _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(x, *how), *how)
        weight = _OPS.dequantize_per_channel(self.codes, self.scales, self.zero_points, 0, -QMAX, QMAX, torch.int8)
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @property
    def in_features(self) -> int:
        """As `nn.Linear` has it: models read it to shape what they give to the layer."""
        return int(self.codes.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    def numbers(self, name: str) -> Int8Layer:
        return Int8Layer(name, self.activation, self.scales.numpy(), self.codes.numpy())


def convert(
    model: nn.Module,
    input_shape: tuple[int, int, int, int],
    path: Path,
    *,
    calibration_images: np.ndarray,
    input_spec_metadata: Mapping[str, Any],
    labels: Sequence[str],
    is_half: bool = True,
) -> Path:
    """Convert a backbone with its base head to a W8A8 `.mlpackage` for iOS 17 or later, and check what was saved.

    Args:
        model: as for `coreml.convert`, in its deploy form: norms must be folded before ranges are taken.
        input_shape: (1, H, W, C).
        path: the package directory, ending in `.mlpackage`.
        calibration_images: real ones, pre-processed as the board does it, float32 [N, H, W, C].
        input_spec_metadata: as for `coreml.convert`.
        labels: as for `coreml.convert`.
        is_half: hold and compute what is not int8 in float16; else in float32.

    Raises:
        ConversionError: the model or the images do not fit, coremltools refused it, or the package that came out has
            other scales, zero points or weights than were put in.
    """
    coreml.require_package_name(path)
    feature_dim(model, input_shape)
    quantized = quantize(model, calibration_images)
    coreml.convert(
        quantized,
        input_shape,
        path,
        input_spec_metadata=input_spec_metadata,
        labels=labels,
        is_half=is_half,
        removed_passes=(REMOVED_PASS,),
    )
    require_int8_layers(path, int8_layers(quantized))
    return path


def quantize(model: nn.Module, calibration_images: np.ndarray) -> nn.Module:
    """A copy of a model in its deploy form whose layers round as the package will; the head stays float.

    Raises:
        ConversionError: the images do not fit, or there is no layer to quantize.
    """
    require_images(calibration_images)
    with evaluating(model):
        quantized = copy.deepcopy(model).requires_grad_(False)
    layers = {name: module for name, module in quantized.named_modules() if _is_quantizable(name, module)}
    seeing = layers_that_see_images(quantized, layers, calibration_images[0])
    activations = calibrate(quantized, {name: layers[name] for name in layers if name in seeing}, calibration_images)
    if not activations:
        raise ConversionError(f"{type(model).__name__} has no Conv2d or Linear outside its head to quantize")
    for name, activation in activations.items():
        parent, _, child = name.rpartition(".")
        setattr(quantized.get_submodule(parent), child, QuantizedLayer(layers[name], activation))
    return quantized


def int8_layers(quantized: nn.Module) -> list[Int8Layer]:
    """The numbers of every quantized layer of a model."""
    modules = quantized.named_modules()
    return [module.numbers(name) for name, module in modules if isinstance(module, QuantizedLayer)]


def read_int8_layers(package: Path, function: str = "main") -> list[Int8Layer]:
    """Read the numbers of every layer with int8 input and weights back from a saved package.

    Raises:
        ConversionError: not a Core ML package, or no such function.
    """
    operations = load_function(package, function).operations
    found = (_read_layer(operation) for operation in operations if operation.op_type in ("conv", "linear"))
    return [layer for layer in found if layer is not None]


def require_int8_layers(package: Path, expected: Sequence[Int8Layer]) -> None:
    """Compare what a package holds with what was put in, consumer by consumer: equal pairs may have been merged.

    Raises:
        ConversionError: a layer is missing, or has other scales, zero points or weights.
    """
    found = read_int8_layers(package)
    for layer in expected:
        if not any(layer.has_the_numbers_of(candidate) for candidate in found):
            raise ConversionError(
                f"{package}: no layer has the scale, zero point and int8 weights of {layer.name}; coremltools changed "
                "them: find the graph pass that did and add it to the removed ones in converters.coreml_w8a8"
            )
    if len(found) < len(expected):
        raise ConversionError(f"{package}: {len(found)} layers compute in int8, expected {len(expected)}")


def quantize_per_channel(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight symmetrically, one scale per output channel: codes int8 [O, ...] and scales float32 [O].

    Scales are exact in float16, and the codes are those of the rounded scale. A channel of zeros has codes of zero.
    """
    flat = weight.reshape(len(weight), -1).astype(np.float32)  # [O, I]
    scales = half_scales(np.abs(flat).max(axis=1) / QMAX)
    codes = np.clip(np.round(flat / scales[:, None]), -QMAX, QMAX).astype(np.int8)
    return codes.reshape(weight.shape), scales


def _is_quantizable(name: str, module: nn.Module) -> bool:
    is_head = name == FLOAT_PART or name.startswith(f"{FLOAT_PART}.")
    if type(module) is nn.Conv2d:  # a subclass may compute something else
        return not is_head and module.padding_mode == "zeros"
    return not is_head and type(module) is nn.Linear


def _read_layer(operation: Any) -> Int8Layer | None:
    weight, activation = operation.inputs["weight"].op, operation.inputs["x"].op
    if weight is None or weight.op_type != "constexpr_affine_dequantize":
        return None
    if activation is None or activation.op_type != "dequantize":
        return None
    codes = weight.inputs["quantized_data"].val
    scales = np.broadcast_to(weight.inputs["scale"].val, len(codes)).astype(np.float32)
    return Int8Layer(operation.name, _read_activation(activation), scales, codes)


def _read_activation(dequantize: Any) -> AffineInt8:
    """Zero points count from the smallest code: coremltools may turn int8 -128 into uint8 0, which it leaves out."""
    dtype = dequantize.inputs["input"].dtype
    zero_point = dequantize.inputs.get("zero_point")
    offset = 0 if dtype.is_unsigned() else QMIN
    code = 0 if zero_point is None else int(zero_point.val)
    return AffineInt8(float(dequantize.inputs["scale"].val), code - offset + QMIN)
