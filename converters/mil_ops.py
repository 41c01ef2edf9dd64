"""The operations of the MIL evaluator, one small function each, after coremltools 9.0's reference (iOS 15-18).

Every function takes the operation's inputs by name, as float32/int32/bool tensors, strings, or lists of tensors; inputs
that the program leaves out are absent, so the defaults here are MIL's. It returns a tensor, or a list of them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = dict[str, Any]
Operation = Callable[[Inputs], Any]


def ints(value: Tensor) -> list[int]:
    return [int(item) for item in value.reshape(-1).tolist()]


def flag(inputs: Inputs, name: str, *, default: bool = False) -> bool:
    return bool(inputs[name]) if name in inputs else default


def number(inputs: Inputs, name: str, default: float) -> float:
    return float(inputs[name]) if name in inputs else default


# --- elementwise ------------------------------------------------------------------------------------------------------


def unary(function: Callable[[Tensor], Tensor]) -> Operation:
    return lambda inputs: function(inputs["x"])


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    return lambda inputs: function(inputs["x"], inputs["y"])


def gelu(inputs: Inputs) -> Tensor:
    x, mode = inputs["x"], inputs.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def clip(inputs: Inputs) -> Tensor:
    return inputs["x"].clamp(float(inputs["alpha"]), float(inputs["beta"]))


def sigmoid_hard(inputs: Inputs) -> Tensor:
    return (number(inputs, "alpha", 0.2) * inputs["x"] + number(inputs, "beta", 0.5)).clamp(0, 1)


def cast(inputs: Inputs) -> Tensor:
    dtype = inputs["dtype"]
    if dtype == "fp16":
        return inputs["x"].half().float()
    return inputs["x"].to({"fp32": torch.float32, "bool": torch.bool}.get(dtype, torch.int32))


def select(inputs: Inputs) -> Tensor:
    return torch.where(inputs["cond"].bool(), inputs["a"], inputs["b"])


# --- products ---------------------------------------------------------------------------------------------------------


def same_padding(
    inputs: Inputs, spatial: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """Padding as MIL writes it, [before, after] per spatial axis, for every `pad_type`."""
    kind = inputs.get("pad_type", "valid")
    if kind == "custom":
        return ints(inputs["pad"]) if "pad" in inputs else [0] * (2 * len(kernel))
    pads = []
    for size, k, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        total = (
            max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0) if kind.startswith("same") else 0
        )
        small, large = total // 2, total - total // 2
        pads += [large, small] if kind == "same_lower" else [small, large]
    return pads


def pad_spatial(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """F.pad counts from the last axis backwards, MIL from the first spatial one forwards."""
    backwards = [size for axis in reversed(range(len(pads) // 2)) for size in pads[2 * axis : 2 * axis + 2]]
    return F.pad(x, backwards, value=value) if any(backwards) else x


def convolution(inputs: Inputs) -> Tensor:
    x, weight = inputs["x"], inputs["weight"]
    rank = x.ndim - 2
    strides = ints(inputs["strides"]) if "strides" in inputs else [1] * rank
    dilations = ints(inputs["dilations"]) if "dilations" in inputs else [1] * rank
    x = pad_spatial(x, same_padding(inputs, list(x.shape[2:]), list(weight.shape[2:]), strides, dilations))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolve(x, weight, inputs.get("bias"), strides, 0, dilations, int(number(inputs, "groups", 1)))


def linear(inputs: Inputs) -> Tensor:
    return F.linear(inputs["x"], inputs["weight"], inputs.get("bias"))


def matmul(inputs: Inputs) -> Tensor:
    x = inputs["x"].transpose(-1, -2) if flag(inputs, "transpose_x") else inputs["x"]
    y = inputs["y"].transpose(-1, -2) if flag(inputs, "transpose_y") else inputs["y"]
    return x @ y


def einsum(inputs: Inputs) -> Tensor:
    return torch.einsum(inputs["equation"], *inputs["values"])


# --- pooling, resizing, normalization ---------------------------------------------------------------------------------


def pool(inputs: Inputs, *, is_average: bool) -> Tensor:
    x, kernel = inputs["x"], ints(inputs["kernel_sizes"])
    if flag(inputs, "ceil_mode") or len(kernel) != 2:
        raise NotImplementedError("pooling with ceil_mode, or over other than two axes")
    strides = ints(inputs["strides"]) if "strides" in inputs else [1, 1]
    pads = same_padding(inputs, list(x.shape[2:]), kernel, strides, [1, 1])
    if not is_average:
        return F.max_pool2d(pad_spatial(x, pads, float("-inf")), kernel, strides)
    means = F.avg_pool2d(pad_spatial(x, pads), kernel, strides)
    if flag(inputs, "exclude_padding_from_average"):
        means = means / F.avg_pool2d(pad_spatial(torch.ones_like(x), pads), kernel, strides)
    return means


def upsample(inputs: Inputs, *, mode: str) -> Tensor:
    factors = (number(inputs, "scale_factor_height", 1), number(inputs, "scale_factor_width", 1))
    if mode == "nearest":
        return F.interpolate(inputs["x"], scale_factor=factors, mode=mode)
    align = flag(inputs, "align_corners", default=True)
    if not align and not flag(inputs, "half_pixel_centers", default=True):
        raise NotImplementedError("bilinear upsampling with neither aligned corners nor half-pixel centres")
    return F.interpolate(inputs["x"], scale_factor=factors, mode=mode, align_corners=align)


def layer_norm(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    axes = sorted(axis % x.ndim for axis in ints(inputs["axes"])) if "axes" in inputs else list(range(x.ndim))
    mean = x.mean(axes, keepdim=True)
    normalized = (x - mean) / (((x - mean) ** 2).mean(axes, keepdim=True) + number(inputs, "epsilon", 1e-5)).sqrt()
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    if "gamma" in inputs:
        normalized = normalized * inputs["gamma"].reshape(shape)
    return normalized + inputs["beta"].reshape(shape) if "beta" in inputs else normalized


def batch_norm(inputs: Inputs) -> Tensor:
    gamma, beta, epsilon = inputs.get("gamma"), inputs.get("beta"), number(inputs, "epsilon", 1e-5)
    return F.batch_norm(inputs["x"], inputs["mean"], inputs["variance"], gamma, beta, training=False, eps=epsilon)


# --- reductions -------------------------------------------------------------------------------------------------------


def reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operation:
    def reduce(inputs: Inputs) -> Tensor:
        x = inputs["x"]
        axes = ints(inputs["axes"]) if "axes" in inputs else list(range(x.ndim))  # left out means all
        return function(x, axes, flag(inputs, "keep_dims"))

    return reduce


def reduce_argmax(inputs: Inputs) -> Tensor:
    return inputs["x"].argmax(int(number(inputs, "axis", -1)), keepdim=flag(inputs, "keep_dims")).to(torch.int32)


# --- shapes -----------------------------------------------------------------------------------------------------------


def squeeze(inputs: Inputs) -> Tensor:
    return inputs["x"].squeeze(ints(inputs["axes"])) if "axes" in inputs else inputs["x"].squeeze()


def expand_dims(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    rank = x.ndim + len(ints(inputs["axes"]))
    for axis in sorted(axis % rank for axis in ints(inputs["axes"])):
        x = x.unsqueeze(axis)
    return x


def reshape(inputs: Inputs) -> Tensor:
    shape = [size or inputs["x"].shape[axis] for axis, size in enumerate(ints(inputs["shape"]))]  # 0 keeps the size
    return inputs["x"].reshape(shape)


def concat(inputs: Inputs) -> Tensor:
    if flag(inputs, "interleave"):
        raise NotImplementedError("interleaved concat")
    return torch.cat(inputs["values"], int(inputs["axis"]))


def stack(inputs: Inputs) -> Tensor:
    return torch.stack(inputs["values"], int(inputs["axis"]))


def split(inputs: Inputs) -> list[Tensor]:
    x, axis = inputs["x"], int(inputs["axis"])
    if "split_sizes" in inputs:
        return list(x.split(ints(inputs["split_sizes"]), axis))
    return list(x.split(x.shape[axis] // int(inputs["num_splits"]), axis))


def slice_by_index(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    begin, end = ints(inputs["begin"]), ints(inputs["end"])
    strides = ints(inputs["stride"]) if "stride" in inputs else [1] * x.ndim
    masks = {
        name: ints(inputs[name]) if name in inputs else [0] * x.ndim
        for name in ("begin_mask", "end_mask", "squeeze_mask")
    }
    for axis in reversed(range(x.ndim)):
        first, last, step = begin[axis], end[axis], strides[axis]
        if masks["squeeze_mask"][axis]:
            x = x.select(axis, first)
            continue
        bounds = slice(None if masks["begin_mask"][axis] else first, None if masks["end_mask"][axis] else last, step)
        x = x.index_select(axis, torch.tensor(range(x.shape[axis])[bounds], dtype=torch.long))
    return x


def slice_by_size(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    for axis, (first, size) in enumerate(zip(ints(inputs["begin"]), ints(inputs["size"]), strict=True)):
        x = x.narrow(axis, first, x.shape[axis] - first if size == -1 else size)
    return x


def pad(inputs: Inputs) -> Tensor:
    if inputs.get("mode", "constant") != "constant":
        raise NotImplementedError(f"padding mode {inputs['mode']}")
    return pad_spatial(inputs["x"], ints(inputs["pad"]), number(inputs, "constant_val", 0.0))


def gather(inputs: Inputs) -> Tensor:
    indices, axis = inputs["indices"].long(), int(number(inputs, "axis", 0)) % inputs["x"].ndim
    picked = inputs["x"].index_select(axis, indices.reshape(-1) % inputs["x"].shape[axis])
    return picked.reshape(*inputs["x"].shape[:axis], *indices.shape, *inputs["x"].shape[axis + 1 :])


# --- quantization -----------------------------------------------------------------------------------------------------


def along_axis(parameter: Tensor, inputs: Inputs, rank: int) -> Tensor:
    if parameter.ndim == 0 or "axis" not in inputs:
        return parameter
    return parameter.reshape([-1 if axis == int(inputs["axis"]) % rank else 1 for axis in range(rank)])


def quantize(inputs: Inputs) -> Tensor:
    x = inputs["input"]
    low, high = (0, 255) if inputs["output_dtype"] == "uint8" else (-128, 127)
    zero_point = along_axis(inputs.get("zero_point", torch.tensor(0)).float(), inputs, x.ndim)
    scaled = x / along_axis(inputs["scale"], inputs, x.ndim)
    return (scaled.round() + zero_point).clamp(low, high).to(torch.int32)


def dequantize(inputs: Inputs) -> Tensor:
    codes = inputs["quantized_data" if "quantized_data" in inputs else "input"].float()
    zero_point = along_axis(inputs.get("zero_point", torch.tensor(0)).float(), inputs, codes.ndim)
    return (codes - zero_point) * along_axis(inputs["scale"], inputs, codes.ndim)


def look_up(inputs: Inputs) -> Tensor:
    """`constexpr_lut_to_dense`: iOS 16 packs the indices, lowest bit first; iOS 18 has one each and grouped tables."""
    indices, table = inputs["indices"], inputs["lut"]
    if "shape" in inputs:
        shape = ints(inputs["shape"])
        bits = int(table.numel()).bit_length() - 1
        count = int(torch.tensor(shape).prod())
        unpacked = (indices.reshape(-1, 1) >> torch.arange(8)) & 1  # [bytes, 8]
        codes = unpacked.reshape(-1)[: count * bits].reshape(count, bits) @ (1 << torch.arange(bits))
        return table[codes].reshape(shape)
    if table.shape[-1] != 1:
        raise NotImplementedError("vector palettes")
    for axis in range(indices.ndim):
        table = table.repeat_interleave(indices.shape[axis] // table.shape[axis], axis)
    return table[..., 0].gather(-1, indices[..., None].long())[..., 0]


def blockwise_shift_scale(inputs: Inputs) -> Tensor:
    data = inputs["data"].float()

    def spread(parameter: Tensor) -> Tensor:
        for axis in range(data.ndim):
            parameter = parameter.repeat_interleave(data.shape[axis] // parameter.shape[axis], axis)
        return parameter.float()

    return (
        (data - spread(inputs["offset"])) * spread(inputs["scale"])
        if "offset" in inputs
        else data * spread(inputs["scale"])
    )


OPERATIONS: dict[str, Operation] = {
    # elementwise, one input
    "relu": unary(F.relu),
    "relu6": unary(F.relu6),
    "sigmoid": unary(torch.sigmoid),
    "silu": unary(F.silu),
    "tanh": unary(torch.tanh),
    "softplus": unary(F.softplus),
    "exp": unary(torch.exp),
    "erf": unary(torch.erf),
    "sqrt": unary(torch.sqrt),
    "square": unary(torch.square),
    "abs": unary(torch.abs),
    "floor": unary(torch.floor),
    "ceil": unary(torch.ceil),
    "identity": unary(lambda x: x),
    "log": lambda inputs: torch.log(inputs["x"] + number(inputs, "epsilon", 1e-45)),
    "rsqrt": lambda inputs: torch.rsqrt(inputs["x"] + number(inputs, "epsilon", 1e-12)),
    "inverse": lambda inputs: 1 / (inputs["x"] + number(inputs, "epsilon", 1e-4)),
    "leaky_relu": lambda inputs: F.leaky_relu(inputs["x"], number(inputs, "alpha", 0.01)),
    "elu": lambda inputs: F.elu(inputs["x"], number(inputs, "alpha", 1.0)),
    "sigmoid_hard": sigmoid_hard,
    "gelu": gelu,
    "clip": clip,
    "cast": cast,
    # elementwise, several inputs
    "add": binary(torch.add),
    "sub": binary(torch.sub),
    "mul": binary(torch.mul),
    "real_div": binary(torch.div),
    "pow": binary(torch.pow),
    "maximum": binary(torch.maximum),
    "minimum": binary(torch.minimum),
    "logical_and": binary(torch.logical_and),
    "equal": binary(torch.eq),
    "greater": binary(torch.gt),
    "greater_equal": binary(torch.ge),
    "less": binary(torch.lt),
    "select": select,
    # products
    "conv": convolution,
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    # pooling, resizing, normalization
    "avg_pool": lambda inputs: pool(inputs, is_average=True),
    "max_pool": lambda inputs: pool(inputs, is_average=False),
    "upsample_bilinear": lambda inputs: upsample(inputs, mode="bilinear"),
    "upsample_nearest_neighbor": lambda inputs: upsample(inputs, mode="nearest"),
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "softmax": lambda inputs: inputs["x"].softmax(int(number(inputs, "axis", -1))),
    # reductions
    "reduce_mean": reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "reduce_sum": reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_max": reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_min": reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_sum_square": reduction(lambda x, axes, keep: (x**2).sum(axes, keepdim=keep)),
    "reduce_l2_norm": reduction(lambda x, axes, keep: (x**2).sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum_exp": reduction(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_argmax": reduce_argmax,
    # shapes
    "reshape": reshape,
    "transpose": lambda inputs: inputs["x"].permute(ints(inputs["perm"])),
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "concat": concat,
    "stack": stack,
    "split": split,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "tile": lambda inputs: inputs["x"].tile(ints(inputs["reps"])),
    "pad": pad,
    "gather": gather,
    # quantization
    "quantize": quantize,
    "dequantize": dequantize,
    "constexpr_affine_dequantize": dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": look_up,
    "constexpr_cast": lambda inputs: inputs["source_val"],
}
