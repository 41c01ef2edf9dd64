"""The MIL evaluator, operation by operation, against torch and against coremltools' own arithmetic on constants."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from converters.coreml import read_specification
from converters.errors import ConversionError, UnsupportedOpError
from converters.mil import MilProgram
from converters.mil_ops import OPERATIONS
from converters.quiet import quiet
from device.contract.files import write_atomic

with quiet():
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


IMAGE = random(2, 4, 6, 8)
ROWS = random(3, 5)
WEIGHT, BIAS = random(6, 4, 3, 3), random(6)
T_WEIGHT, T_BIAS = torch.from_numpy(WEIGHT), torch.from_numpy(BIAS)
GROUPED = random(4, 2, 3, 3)
MATRIX = random(7, 5)
GAMMA, BETA, MEAN, VARIANCE = random(4), random(4), random(4), np.abs(random(4)) + 0.5


def program_of(build, *shapes: tuple[int, ...], target=None) -> MilProgram:
    """A one-function program over float32 inputs x, y of these shapes."""
    specs = [mb.TensorSpec(shape=shape, dtype=types.fp32) for shape in shapes]
    wrapped = (lambda x: build(x)) if len(shapes) == 1 else (lambda x, y: build(x, y))
    program = mb.program(input_specs=specs, opset_version=target or ct.target.iOS17)(wrapped)
    return MilProgram.from_function(program.functions["main"])


def evaluate(build, *inputs: np.ndarray, target=None) -> list[np.ndarray]:
    program = program_of(build, *(value.shape for value in inputs), target=target)
    return list(program.run(dict(zip("xy", inputs, strict=False))).values())


def half_padded(x, pads):
    return F.pad(x, pads, value=0.0)


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


CASES = {
    # elementwise
    "relu": (lambda x: mb.relu(x=x), F.relu),
    "relu6": (lambda x: mb.relu6(x=x), F.relu6),
    "sigmoid": (lambda x: mb.sigmoid(x=x), torch.sigmoid),
    "silu": (lambda x: mb.silu(x=x), F.silu),
    "tanh": (lambda x: mb.tanh(x=x), torch.tanh),
    "softplus": (lambda x: mb.softplus(x=x), F.softplus),
    "exp": (lambda x: mb.exp(x=x), torch.exp),
    "erf": (lambda x: mb.erf(x=x), torch.erf),
    "sqrt": (lambda x: mb.sqrt(x=mb.square(x=x)), torch.abs),
    "abs": (lambda x: mb.abs(x=x), torch.abs),
    "floor": (lambda x: mb.floor(x=x), torch.floor),
    "ceil": (lambda x: mb.ceil(x=x), torch.ceil),
    "log": (lambda x: mb.log(x=mb.exp(x=x)), lambda x: x),
    "rsqrt": (lambda x: mb.rsqrt(x=mb.square(x=x), epsilon=0.5), lambda x: (x * x + 0.5) ** -0.5),
    "inverse": (lambda x: mb.inverse(x=mb.exp(x=x), epsilon=0.25), lambda x: 1 / (x.exp() + 0.25)),
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.3), lambda x: F.leaky_relu(x, 0.3)),
    "elu": (lambda x: mb.elu(x=x, alpha=0.7), lambda x: F.elu(x, 0.7)),
    "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5), F.hardsigmoid),
    "gelu": (lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu),
    "gelu tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh")),
    "gelu sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * torch.sigmoid(1.702 * x)),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.4), lambda x: x.clamp(-0.5, 0.4)),
    "cast int32": (lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.to(torch.int32)),
    "cast fp16": (lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), lambda x: x.half().float()),
    "select": (
        lambda x: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=mb.mul(x=x, y=2.0)),
        lambda x: torch.where(x > 0, x, 2 * x),
    ),
    "comparisons": (
        lambda x: mb.cast(x=mb.logical_and(x=mb.less(x=x, y=1.0), y=mb.greater_equal(x=x, y=0.0)), dtype="fp32"),
        lambda x: ((x < 1) & (x >= 0)).float(),
    ),
    "maximum": (lambda x: mb.minimum(x=mb.maximum(x=x, y=-0.2), y=0.3), lambda x: x.clamp(-0.2, 0.3)),
    "pow": (lambda x: mb.pow(x=mb.abs(x=x), y=1.5), lambda x: x.abs() ** 1.5),
    "real_div": (
        lambda x: mb.real_div(x=x, y=GAMMA.reshape(4, 1, 1)),
        lambda x: x / torch.tensor(GAMMA).reshape(4, 1, 1),
    ),
    "sub": (lambda x: mb.sub(x=x, y=mb.add(x=x, y=mb.mul(x=x, y=x))), lambda x: x - (x + x * x)),
    # products
    "conv valid": (
        lambda x: mb.conv(x=x, weight=WEIGHT, bias=BIAS),
        lambda x: F.conv2d(x, T_WEIGHT, T_BIAS),
    ),
    "conv stride, custom pad": (
        lambda x: mb.conv(x=x, weight=WEIGHT, strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1]),
        lambda x: F.conv2d(half_padded(x, (2, 1, 1, 0)), T_WEIGHT, stride=(2, 1)),
    ),
    "conv same, even size": (
        lambda x: mb.conv(x=x, weight=WEIGHT, strides=[2, 2], pad_type="same"),
        lambda x: F.conv2d(half_padded(x, (0, 1, 0, 1)), T_WEIGHT, stride=2),
    ),
    "conv same_lower": (
        lambda x: mb.conv(x=x, weight=WEIGHT, strides=[2, 2], pad_type="same_lower"),
        lambda x: F.conv2d(half_padded(x, (1, 0, 1, 0)), T_WEIGHT, stride=2),
    ),
    "conv grouped, dilated": (
        lambda x: mb.conv(x=x, weight=GROUPED, groups=2, dilations=[2, 2]),
        lambda x: F.conv2d(x, torch.tensor(GROUPED), groups=2, dilation=2),
    ),
    "einsum": (
        lambda x: mb.einsum(values=[x, mb.transpose(x=x, perm=[0, 3, 2, 1])], equation="nchw,nwhu->nchu"),
        lambda x: torch.einsum("nchw,nwhu->nchu", x, x.permute(0, 3, 2, 1)),
    ),
    "matmul transposed": (lambda x: mb.matmul(x=x, y=x, transpose_y=True), lambda x: x @ x.transpose(2, 3)),
    "matmul transposed first": (lambda x: mb.matmul(x=x, y=x, transpose_x=True), lambda x: x.transpose(2, 3) @ x),
    # pooling, resizing, normalization
    "avg_pool": (
        lambda x: mb.avg_pool(
            x=x, kernel_sizes=[3, 3], pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True
        ),
        average,
    ),
    "avg_pool counting the padding": (
        lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
    ),
    "max_pool": (
        lambda x: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]),
        lambda x: F.max_pool2d(x, 3, 2, 1),
    ),
    "upsample_bilinear": (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2.0, scale_factor_width=3.0, align_corners=False),
        lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="bilinear", align_corners=False),
    ),
    "upsample_nearest_neighbor": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    ),
    "layer_norm": (
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=np.tile(GAMMA, 2), beta=np.tile(BETA, 2), epsilon=1e-3),
        lambda x: F.layer_norm(x, (8,), torch.tensor(np.tile(GAMMA, 2)), torch.tensor(np.tile(BETA, 2)), 1e-3),
    ),
    "layer_norm over channels": (
        lambda x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=BETA),
        lambda x: F.layer_norm(x.movedim(1, 3), (4,), torch.tensor(GAMMA), torch.tensor(BETA)).movedim(3, 1),
    ),
    "batch_norm": (
        lambda x: mb.batch_norm(x=x, mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=1e-3),
        lambda x: F.batch_norm(x, *map(torch.tensor, (MEAN, VARIANCE, GAMMA, BETA)), eps=1e-3),
    ),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1)),
    # reductions
    "reduce_mean": (lambda x: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True), lambda x: x.mean((2, 3), keepdim=True)),
    "reduce_mean over all": (lambda x: mb.reduce_mean(x=x), lambda x: x.mean()),
    "reduce_sum": (lambda x: mb.reduce_sum(x=x, axes=[-1]), lambda x: x.sum(-1)),
    "reduce_max": (lambda x: mb.reduce_max(x=x, axes=[1]), lambda x: x.amax(1)),
    "reduce_min": (lambda x: mb.reduce_min(x=x, axes=[1]), lambda x: x.amin(1)),
    "reduce_sum_square": (lambda x: mb.reduce_sum_square(x=x, axes=[1]), lambda x: (x**2).sum(1)),
    "reduce_l2_norm": (lambda x: mb.reduce_l2_norm(x=x, axes=[1]), lambda x: x.norm(dim=1)),
    "reduce_log_sum_exp": (lambda x: mb.reduce_log_sum_exp(x=x, axes=[1]), lambda x: x.logsumexp(1)),
    "reduce_argmax": (lambda x: mb.reduce_argmax(x=x, axis=2), lambda x: x.argmax(2).to(torch.int32)),
    # shapes
    "reshape": (lambda x: mb.reshape(x=x, shape=[2, -1, 3]), lambda x: x.reshape(2, -1, 3)),
    "transpose": (lambda x: mb.transpose(x=x, perm=[0, 2, 3, 1]), lambda x: x.permute(0, 2, 3, 1)),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None]),
    "squeeze": (lambda x: mb.squeeze(x=mb.expand_dims(x=x, axes=[1]), axes=[1]), lambda x: x),
    "concat": (lambda x: mb.concat(values=[x, mb.relu(x=x)], axis=-1), lambda x: torch.cat([x, x.relu()], -1)),
    "stack": (lambda x: mb.stack(values=[x, mb.relu(x=x)], axis=1), lambda x: torch.stack([x, x.relu()], 1)),
    "split": (lambda x: mb.split(x=x, num_splits=2, axis=1)[1], lambda x: x.chunk(2, 1)[1]),
    "split sizes": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=1)[1], lambda x: x[:, 1:]),
    "slice_by_index": (
        lambda x: mb.slice_by_index(
            x=x,
            begin=[0, 3, 1, 2],
            end=[1, 4, 0, 7],
            stride=[1, 1, 2, 2],
            begin_mask=[True, False, False, False],
            end_mask=[True, False, True, False],
            squeeze_mask=[False, True, False, False],
        ),
        lambda x: x[:, 3, 1::2, 2:7:2],
    ),
    "slice_by_index backwards": (
        lambda x: mb.slice_by_index(
            x=x, begin=[0, 0, 0, -1], end=[2, 4, 6, 0], stride=[1, 1, 1, -2], end_mask=[False, False, False, True]
        ),
        lambda x: x[..., [7, 5, 3, 1]],
    ),
    "slice_by_size": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, 2, 3], size=[2, 2, -1, 4]),
        lambda x: x[:, 1:3, 2:, 3:7],
    ),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 1, 3]), lambda x: x.tile(1, 2, 1, 3)),
    "pad": (
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 0], mode="constant", constant_val=0.5),
        lambda x: F.pad(x, (3, 0, 1, 2), value=0.5),
    ),
    "gather": (
        lambda x: mb.gather(x=x, indices=[[3, 0], [1, 1]], axis=1),
        lambda x: x[:, torch.tensor([[3, 0], [1, 1]])],
    ),
    # quantization
    "quantize": (
        lambda x: mb.dequantize(
            input=mb.quantize(input=x, scale=np.float32(0.05), zero_point=np.int8(-7), output_dtype="int8"),
            scale=np.float32(0.05),
            zero_point=np.int8(-7),
        ),
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, -7, -128, 127),
    ),
    "quantize uint8": (
        lambda x: mb.cast(
            x=mb.quantize(input=x, scale=np.float32(0.02), zero_point=np.uint8(100), output_dtype="uint8"), dtype="fp32"
        ),
        lambda x: ((x / 0.02).round() + 100).clamp(0, 255),
    ),
    "quantize along an axis": (
        lambda x: mb.dequantize(
            input=mb.quantize(input=x, scale=VARIANCE, axis=1, output_dtype="int8"), scale=VARIANCE, axis=1
        ),
        lambda x: torch.fake_quantize_per_channel_affine(x, torch.tensor(VARIANCE), torch.zeros(4), 1, -128, 127),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operation_matches_torch(name):
    build, expected = CASES[name]
    (output,) = evaluate(build, IMAGE)
    expected = expected(torch.from_numpy(IMAGE)).numpy()
    assert output.dtype == expected.dtype
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_linear():
    (output,) = evaluate(lambda x: mb.linear(x=x, weight=MATRIX, bias=random(7) * 0 + 1), ROWS)
    np.testing.assert_allclose(output, ROWS @ MATRIX.T + 1, atol=1e-5)


def test_several_inputs_and_outputs_go_by_name():
    program = program_of(lambda x, y: (mb.sub(x=x, y=y, name="difference"), mb.add(x=x, y=y, name="total")), (2,), (2,))
    outputs = program.run({"y": np.array([1, 2], np.float32), "x": np.array([5, 5], np.float32)})
    assert {name: value.tolist() for name, value in outputs.items()} == {"difference": [4, 3], "total": [6, 7]}


@pytest.mark.parametrize("axis", [0, 1])
def test_affine_weights_decode(axis):
    codes = RNG.integers(-127, 128, (6, 5)).astype(np.int8)
    scale, zero_point = np.abs(random(codes.shape[axis])) + 0.1, RNG.integers(-3, 3, codes.shape[axis]).astype(np.int8)

    def build(x):
        weight = mb.constexpr_affine_dequantize(
            quantized_data=codes, scale=scale, zero_point=zero_point, axis=np.int32(axis)
        )
        return mb.linear(x=x, weight=weight)

    (output,) = evaluate(build, ROWS)
    shape = (-1, 1) if axis == 0 else (1, -1)
    weight = (codes.astype(np.float32) - zero_point.reshape(shape)) * scale.reshape(shape)
    np.testing.assert_allclose(output, ROWS @ weight.T, rtol=1e-4, atol=1e-3)


def test_blockwise_weights_decode():
    codes, scale = RNG.integers(-127, 128, (6, 4)).astype(np.int8), np.abs(random(6, 2)) + 0.1
    (output,) = evaluate(
        lambda x: mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=codes, scale=scale)),
        ROWS[:, :4],
        target=ct.target.iOS18,
    )
    np.testing.assert_allclose(output, ROWS[:, :4] @ (codes * np.repeat(scale, 2, axis=1)).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("mode", "min_cosine"), [("int8", 0.999), ("palette", 0.98)])
def test_compressed_weights_decode_as_coremltools_does(package, images, tmp_path, mode, min_cosine):
    copied = shutil.copytree(
        package, tmp_path / "copied.mlpackage"
    )  # MLModel rewrites the Manifest.json of what it reads
    with quiet():
        model = ct.models.MLModel(str(copied), skip_model_load=True)
        if mode == "int8":
            config = cto.OptimizationConfig(global_config=cto.OpLinearQuantizerConfig(weight_threshold=256))
            compressed = cto.linear_quantize_weights(model, config)
        else:  # uniform: k-means needs an old scikit-learn
            palette = cto.OpPalettizerConfig(mode="uniform", nbits=6, weight_threshold=256)
            compressed = cto.palettize_weights(model, cto.OptimizationConfig(global_config=palette))
        compressed.save(str(tmp_path / "c.mlpackage"))
        plain = cto.decompress_weights(ct.models.MLModel(str(tmp_path / "c.mlpackage"), skip_model_load=True))
        plain.save(str(tmp_path / "plain.mlpackage"))
    program = MilProgram(tmp_path / "c.mlpackage")
    inputs = {"images": images[:1]}
    ours, theirs, original = (
        item.run(inputs)["features"][0]
        for item in (program, MilProgram(tmp_path / "plain.mlpackage"), MilProgram(package))
    )
    assert any(name.startswith("constexpr_") for name in program.op_types)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # float16 rounding of a decoded weight
    assert ours @ original / np.linalg.norm(ours) / np.linalg.norm(original) > min_cosine


def test_constants_are_decoded_once(package, images):
    program = MilProgram(package)
    first = program.run({"images": images[:1]})
    cached = {name: id(value) for name, value in program._constants.items()}
    second = program.run({"images": images[:1]})
    assert cached == {name: id(value) for name, value in program._constants.items()}
    assert all((first[name] == second[name]).all() for name in first)


def test_reading_a_package_does_not_touch_it(package):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in package.rglob("*") if path.is_file()}
    MilProgram(package)
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in package.rglob("*") if path.is_file()
    }


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_operations_are_named():
    with pytest.raises(
        UnsupportedOpError, match=r"program: MIL operations atan, cumsum are not in converters\.mil_ops"
    ):
        program_of(lambda x: mb.atan(x=mb.cumsum(x=x)), (2,))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: mb.pad(x=x, pad=[1, 1], mode="reflect", name="edge"), "pad 'edge': padding mode reflect"),
        (
            lambda x: mb.concat(values=[x, x], axis=1, interleave=True, name="joined"),
            "concat 'joined': interleaved concat",
        ),
        (
            lambda x: mb.avg_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True, name="p"),
            "avg_pool 'p'",
        ),
    ],
)
def test_unknown_uses_are_named(build, message):
    with pytest.raises(UnsupportedOpError, match=message):
        evaluate(build, IMAGE)


@pytest.mark.parametrize("inputs", [{}, {"image": np.zeros((1, 16, 16, 1))}, {"images": np.zeros((1, 16, 16))}])
def test_wrong_inputs_are_refused(package, inputs):
    with pytest.raises(ConversionError, match=r"inputs must be \{'images': \(1, 16, 16, 1\)\}, got"):
        MilProgram(package).run(inputs)


def test_unknown_function_is_refused(package):
    with pytest.raises(ConversionError, match="has no function 'train', only main"):
        MilProgram(package, function="train")


def test_damaged_program_is_refused(package, tmp_path):
    damaged = tmp_path / "damaged.mlpackage"
    specification = read_specification(package)
    specification.mlProgram.functions["main"].block_specializations["CoreML7"].operations[0].type = "no_such_op"
    write_atomic(damaged / "Data/com.apple.CoreML/model.mlmodel", specification.SerializeToString())
    with pytest.raises(ConversionError, match="not a readable Core ML program"):
        MilProgram(damaged)


def test_every_operation_is_tested():
    elsewhere = {"linear", "identity", "equal", "logical_and", "constexpr_cast", "constexpr_lut_to_dense"}
    used = {op for build, _ in CASES.values() for op in program_of(build, IMAGE.shape).op_types}
    used |= {"constexpr_affine_dequantize", "constexpr_blockwise_shift_scale"}
    assert OPERATIONS.keys() - used - elsewhere == set()
