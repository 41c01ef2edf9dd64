"""Pre-processing equals PyTorch's, and refuses frames that are not what the model takes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device.contract.errors import FrameError
from device.contract.manifest import InputSpec
from device.preprocess import preprocess, resize_bilinear

sizes, small = st.integers(1, 40), st.integers(1, 12)


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes, st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_resizing_equals_torch(height, width, to_height, to_width, channels, seed):
    torch = pytest.importorskip("torch", reason="resizing is compared with PyTorch, which is not installed here")
    images = np.random.default_rng(seed).uniform(0, 255, (2, height, width, channels)).astype(np.float32)
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(nchw, (to_height, to_width), mode="bilinear", align_corners=False)
    ours = resize_bilinear(images, to_height, to_width)
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), atol=2e-3)  # 255 * a few float32 roundings


@example(2, 5, 7, 5, 7, 3, 0)
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), small, small, small, small, st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_the_host_s_batch_and_the_board_s_single_frame_agree_bit_for_bit(
    n, height, width, to_height, to_width, c, seed
):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (n, height, width, c), dtype=np.uint8)
    mean, std = rng.uniform(-1, 1, c), rng.uniform(0.1, 2, c)
    spec = InputSpec(height=to_height, width=to_width, channels=c, mean=tuple(mean), std=tuple(std))
    batch = preprocess(frames, spec)
    for frame, expected in zip(frames, batch, strict=True):
        np.testing.assert_array_equal(preprocess(frame[None], spec)[0], expected)
    out = np.full_like(batch, np.nan)
    assert preprocess(frames, spec, out=out) is out
    np.testing.assert_array_equal(out, batch)
    turned = np.asfortranarray(frames)  # memory order is no business of the result's
    np.testing.assert_array_equal(preprocess(turned, spec), batch)
    np.testing.assert_array_equal(batch, stepwise(frames, spec))


def stepwise(frames: np.ndarray, spec: InputSpec) -> np.ndarray:
    """The same in Python's own arithmetic, one value at a time, each result rounded to float32."""
    one = np.float32
    values = np.empty((len(frames), spec.height, spec.width, spec.channels), np.float32)
    rows = [neighbours(y, frames.shape[1], spec.height) for y in range(spec.height)]
    columns = [neighbours(x, frames.shape[2], spec.width) for x in range(spec.width)]
    is_sized = frames.shape[1:3] == (spec.height, spec.width)
    for n, y, x, c in np.ndindex(*values.shape):
        top, bottom, down = rows[y]
        left, right, along = columns[x]
        upper, lower = frames[n, top, :, c], frames[n, bottom, :, c]

        def between(column, upper=upper, lower=lower, down=down):
            return one(one(one(upper[column]) * one(1 - down)) + one(one(lower[column]) * down))

        value = one(one(between(left) * one(1 - along)) + one(between(right) * along))
        value = one(frames[n, y, x, c]) if is_sized else value
        values[n, y, x, c] = one(one(one(value / one(255)) - one(spec.mean[c])) / one(spec.std[c]))
    return values


def neighbours(target: int, source_size: int, target_size: int) -> tuple[int, int, np.float32]:
    position = min(max((target + 0.5) * (source_size / target_size) - 0.5, 0), source_size - 1)
    low = int(position)
    return low, min(low + 1, source_size - 1), np.float32(position - low)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 2), small, st.integers(1, 60), small, small, st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_wide_frames_get_the_same_numbers_from_the_columns_they_need(n, height, width, to_height, to_width, c, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (n, height, width, c), dtype=np.uint8)
    expected = resize_bilinear(frames, to_height, to_width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("device.preprocess.BLOCK_BYTES", 1)
        np.testing.assert_array_equal(resize_bilinear(frames, to_height, to_width), expected)


def test_a_frame_of_one_long_row_takes_little_memory():
    frame = np.zeros((1, 1, 2_000_000, 3), np.uint8)
    tracemalloc.start()
    try:
        resize_bilinear(frame, 224, 224)
        assert tracemalloc.get_traced_memory()[1] < frame.nbytes
    finally:
        tracemalloc.stop()


def test_normalizes_after_scaling_to_one():
    spec = InputSpec(height=2, width=2, channels=3, mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0))
    frames = np.full((1, 2, 2, 3), 255, np.uint8)
    np.testing.assert_allclose(preprocess(frames, spec)[0, 0, 0], [1.0, 1.0, 0.0])


def test_the_frame_s_own_size_is_left_alone():
    spec = InputSpec(height=5, width=7, channels=1, mean=(0.0,), std=(1.0,))
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 1), dtype=np.uint8)
    np.testing.assert_array_equal(preprocess(frames, spec), frames.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 1), np.float32),
        np.zeros((1, 0, 4, 1), np.uint8),
    ],
)
def test_wrong_frames_are_refused_with_what_was_expected(frames):
    spec = InputSpec(height=2, width=2, channels=1, mean=(0.0,), std=(1.0,))
    with pytest.raises(FrameError, match=r"must be uint8 \[N, h, w, 1\], got"):
        preprocess(frames, spec)
