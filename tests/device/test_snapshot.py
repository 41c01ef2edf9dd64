"""Snapshots are bounded pictures that other programs read; diagnostics are bounded and tell no secrets."""

import base64
import io
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from device.contract.errors import FrameError
from device.diagnostics import ERRORS_KEPT, TEXT_KEPT, ErrorLog, diagnose
from device.frames import Frame
from device.snapshot import MAX_BYTES, MAX_SIDE, encode_png, take_snapshot


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_pillow_reads_what_is_written(height, width, channels, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = np.asarray(Image.open(io.BytesIO(encode_png(pixels))))
    assert np.array_equal(image.reshape(pixels.shape), pixels)


@pytest.mark.parametrize("shape", [(2000, 3000, 3), (640, 640, 3), (3000, 10, 1), (1, 1, 1)])
def test_a_snapshot_is_bounded_even_of_noise(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    result = take_snapshot(Frame("f", pixels))
    png = base64.b64decode(result["image"])
    assert len(png) <= MAX_BYTES
    assert Image.open(io.BytesIO(png)).size == (result["width"], result["height"])
    assert max(result["width"], result["height"]) <= MAX_SIDE
    assert (result["frame_height"], result["frame_width"]) == shape[:2]


def test_odd_channels_are_refused():
    with pytest.raises(FrameError, match="this frame has 4"):
        take_snapshot(Frame("f", np.zeros((2, 2, 4), np.uint8)))


def test_diagnostics_are_bounded(tmp_path):
    errors = ErrorLog()
    logger = logging.getLogger("test_diagnostics")
    logger.addHandler(errors)
    for number in range(3 * ERRORS_KEPT):
        logger.warning("line %d\n%s", number, "x" * 10_000)
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("outer")
    logger.removeHandler(errors)
    report = diagnose(tmp_path, errors)
    assert len(report["errors"]) == ERRORS_KEPT
    assert all(len(entry["text"]) <= TEXT_KEPT and "\n" not in entry["text"] for entry in report["errors"])
    assert report["errors"][-1]["text"] == "outer (ValueError: inner)"
    assert len(json.dumps(report, allow_nan=False)) < 32_000
    assert report["memory_bytes"] > 1e6
    assert report["certificate_expires"] is None
