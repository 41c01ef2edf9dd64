"""Figures of agreement, and the refusal of what does not agree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from converters.errors import ParityError
from converters.parity import compare

OUTPUTS = arrays(np.float32, (4, 3), elements=st.floats(-1e3, 1e3, width=32))


@given(OUTPUTS)
def test_everything_agrees_with_itself(outputs):
    parity = compare(outputs, outputs)
    assert (parity.argmax_agreement, parity.max_abs_difference, parity.images) == (1.0, 0.0, 4)
    assert parity.min_cosine == pytest.approx(1.0)


@given(OUTPUTS, OUTPUTS)
def test_figures_are_symmetric_and_bounded(reference, outputs):
    parity = compare(reference, outputs)
    assert -1 - 1e-9 <= parity.min_cosine <= parity.mean_cosine + 1e-9 <= 1 + 2e-9
    assert 0 <= parity.argmax_agreement <= 1
    assert parity == compare(outputs, reference)


def test_figures_by_hand():
    parity = compare(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 3.0]]))
    assert (parity.argmax_agreement, parity.min_cosine, parity.mean_cosine, parity.max_abs_difference) == (
        0.5,
        0.0,
        0.5,
        1.0,
    )


def test_a_silent_model_does_not_agree():
    assert compare(np.ones((1, 3)), np.zeros((1, 3))).min_cosine == 0.0


@pytest.mark.parametrize("bad", [np.ones((2, 2)), np.ones(3), np.ones((0, 3))])
def test_shapes_must_be_equal(bad):
    with pytest.raises(ParityError, match="cannot compare outputs"):
        compare(np.ones((1, 3)), bad)


def test_nan_is_named():
    with pytest.raises(ParityError, match="outputs of image 1 hold NaN or infinity"):
        compare(np.ones((2, 2)), np.array([[1, 1], [np.nan, 1]]))
