"""Pre-processing equals PyTorch's, and refuses frames that are not what the model takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.contract.errors import FrameError
from device.contract.manifest import InputSpec
from device.preprocess import preprocess, resize_bilinear

sizes = st.integers(1, 40)


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes, st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_resizing_equals_torch(height, width, to_height, to_width, channels, seed):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    images = np.random.default_rng(seed).uniform(0, 255, (2, height, width, channels)).astype(np.float32)
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(nchw, (to_height, to_width), mode="bilinear", align_corners=False)
    ours = resize_bilinear(images, to_height, to_width)
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), atol=2e-3)  # 255 * a few float32 roundings


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
