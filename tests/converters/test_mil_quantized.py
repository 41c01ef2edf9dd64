"""The evaluator's quantized operations against NumPy written from the format's text, not from our code or coremltools'.

`lut` and `indices`: coremltools' operation reference, `constexpr_lut_to_dense` of iOS 16 (packed, lowest bit first) and of
iOS 18 (an index each, one table per block); `constexpr_affine_dequantize`, `constexpr_blockwise_shift_scale`, `quantize`.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import UnsupportedOpError
from converters.mil_ops import OPERATIONS
from converters.quiet import quiet
from tests.converters.test_mil import evaluate, program_of

with quiet():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = ((6, 4), (8, 3, 3, 3))
NOTHING = np.zeros((1, 1), np.float32)


def decode(build, target=ct.target.iOS17):
    """What the evaluator makes of a constant: the program adds it to zeros of its shape."""
    return evaluate(lambda x: mb.add(x=x, y=build()), NOTHING, target=target)[0]


def packed(indices, num_bits):
    """Each index's bits, lowest first, one after another in bytes that fill from their lowest bit."""
    whole = sum(int(index) << (num_bits * position) for position, index in enumerate(indices.reshape(-1)))
    return np.frombuffer(whole.to_bytes(-(-indices.size * num_bits // 8), "little"), np.uint8)


@pytest.mark.parametrize("num_bits", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_palette(num_bits, shape):
    rng = np.random.default_rng(num_bits)
    indices = rng.integers(0, 2**num_bits, shape)
    lut = rng.standard_normal(2**num_bits).astype(np.float32)
    found = decode(
        lambda: mb.constexpr_lut_to_dense(indices=packed(indices, num_bits), lut=lut, shape=np.array(shape, np.uint32))
    )
    np.testing.assert_array_equal(found, lut[indices])


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("shape", "groups"), [(SHAPES[0], (3, 1)), (SHAPES[0], (3, 2)), (SHAPES[1], (2, 1, 1, 1))])
def test_grouped_palette(num_bits, shape, groups):
    rng = np.random.default_rng(num_bits)
    indices = rng.integers(0, 2**num_bits, shape)
    lut = rng.standard_normal((*groups, 2**num_bits, 1)).astype(np.float32)
    dtype = types.nptype_from_builtin(types.string_to_builtin(f"uint{num_bits}"))
    found = decode(lambda: mb.constexpr_lut_to_dense(indices=indices.astype(dtype), lut=lut), ct.target.iOS18)
    for position in np.ndindex(shape):
        block = tuple(place * count // size for place, count, size in zip(position, groups, shape, strict=True))
        assert found[position] == lut[block][indices[position], 0]


@given(SEEDS)
def test_affine_dequantize(seed):
    rng = np.random.default_rng(seed)
    unsigned, axis = bool(rng.integers(2)), int(rng.integers(3))
    dtype, low = (np.uint8, 0) if unsigned else (np.int8, -128)
    codes = rng.integers(low, low + 256, (3, 4, 5)).astype(dtype)
    scale = rng.random(codes.shape[axis]).astype(np.float32) + 0.1
    zero_point = rng.integers(low, low + 256, codes.shape[axis]).astype(dtype)
    found = decode(
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=codes, scale=scale, zero_point=zero_point, axis=np.int32(axis)
        )
    )
    for position in np.ndindex(codes.shape):
        channel = position[axis]
        expected = np.float32(int(codes[position]) - int(zero_point[channel])) * scale[channel]
        assert found[position] == pytest.approx(expected, rel=1e-6)


@given(SEEDS)
def test_blockwise_shift_scale(seed):
    rng = np.random.default_rng(seed)
    blocks = (int(rng.choice([1, 2, 6])), int(rng.choice([1, 2, 4])))
    data = rng.integers(-128, 128, (6, 4)).astype(np.int8)
    scale = rng.random(blocks).astype(np.float32) + 0.1
    offset = rng.integers(-128, 128, blocks).astype(np.int8) if rng.integers(2) else None
    arguments = {"data": data, "scale": scale} | ({} if offset is None else {"offset": offset})
    found = decode(lambda: mb.constexpr_blockwise_shift_scale(**arguments), ct.target.iOS18)
    for row, column in np.ndindex(data.shape):
        block = row * blocks[0] // 6, column * blocks[1] // 4
        shift = 0 if offset is None else int(offset[block])
        assert found[row, column] == pytest.approx((int(data[row, column]) - shift) * scale[block], rel=1e-6)


@given(SEEDS)
def test_quantize_and_dequantize(seed):
    rng = np.random.default_rng(seed)
    unsigned = bool(rng.integers(2))
    low = 0 if unsigned else -128
    scale = np.float32(rng.choice([0.5, 0.25, 0.03125]))  # exact, so that ties are ties in both
    zero_point = (np.uint8 if unsigned else np.int8)(rng.integers(low, low + 256))
    x = (rng.integers(-600, 600, (4, 5)) * scale / 2).astype(np.float32)
    dtype = "uint8" if unsigned else "int8"

    def build(x):
        codes = mb.quantize(input=x, scale=scale, zero_point=zero_point, output_dtype=dtype)
        return mb.cast(x=codes, dtype="int32"), mb.dequantize(input=codes, scale=scale, zero_point=zero_point)

    codes, values = evaluate(build, x)
    expected = np.clip(np.rint(x / scale) + int(zero_point), low, low + 255)  # ties to even
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(values, (expected - int(zero_point)) * scale)


@given(SEEDS)
def test_softmax_regression_operations(seed):
    x = (np.random.default_rng(seed).standard_normal((3, 5)) * 30).astype(np.float32)
    peak = x.astype(np.float64).max(axis=1, keepdims=True)
    expected = peak + np.log(np.exp(x - peak).sum(axis=1, keepdims=True))
    (found,) = evaluate(lambda x: mb.reduce_log_sum_exp(x=x, axes=[1], keep_dims=True), x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    (found,) = evaluate(lambda x: mb.exp(x=x), x / 10)
    np.testing.assert_allclose(found, np.exp((x / 10).astype(np.float64)), rtol=1e-5)


def test_an_unknown_constant_form_is_an_error_that_names_it():
    mask, data = np.array([[1, 0], [0, 1]], np.uint8).astype(bool), np.array([1, 2], np.float32)
    with pytest.raises(
        UnsupportedOpError, match=r"MIL operations constexpr_sparse_to_dense are not in converters\.mil_ops"
    ):
        program_of(
            lambda x: mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=data, mask=_bits(mask))),
            (2, 2),
            target=ct.target.iOS18,
        )


def test_vector_palettes_are_refused_by_name():
    lut = np.zeros((1, 1, 4, 2), np.float32)
    with pytest.raises(NotImplementedError, match="vector palettes"):
        OPERATIONS["constexpr_lut_to_dense"]({"indices": np.zeros((2, 2)), "lut": lut})


def _bits(mask):
    return mask.astype(types.nptype_from_builtin(types.uint1))
