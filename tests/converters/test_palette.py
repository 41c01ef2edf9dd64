"""Palettes: the best there are, never further from the weights than an even one, and the same every time."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from converters.errors import ConversionError
from converters.palette import MAX_VALUES, NUM_BITS, nearest, palettize, squared_error

WEIGHTS = arrays(np.float16, st.integers(1, 60), elements=st.floats(-8, 8, width=16))
RNG = np.random.default_rng(0)


def error(weights, palette, indices):
    return float(((palette.astype(np.float64)[indices] - weights.astype(np.float64).reshape(-1)) ** 2).sum())


def least_error(weights, size):
    """By trying every way to cut the sorted weights into intervals."""
    ordered = np.sort(weights.astype(np.float64))
    cuts = [(0, *inner, len(ordered)) for inner in combinations(range(1, len(ordered)), size - 1)]
    return min(sum(ordered[a:b].var() * (b - a) for a, b in pairwise(cut)) for cut in cuts)


@pytest.mark.parametrize("num_bits", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_no_palette_is_closer(num_bits, seed):
    weights = np.random.default_rng(seed).standard_normal(11)  # float64: entries are not rounded
    assert error(weights, *palettize(weights, num_bits)) == pytest.approx(least_error(weights, 2**num_bits), abs=1e-12)


@given(WEIGHTS, st.sampled_from(NUM_BITS))
def test_never_further_than_an_even_palette(weights, num_bits):
    palette, indices = palettize(weights, num_bits)
    even = np.linspace(float(weights.min()), float(weights.max()), 2**num_bits).astype(np.float16)
    assert palette.shape == (2**num_bits,)
    assert (np.diff(palette.astype(np.float32)) >= 0).all()
    assert error(weights, palette, indices) <= error(weights, even, nearest(even, weights))


@given(WEIGHTS, st.sampled_from(NUM_BITS))
def test_each_weight_gets_the_nearest_entry(weights, num_bits):
    palette, indices = palettize(weights, num_bits)
    distances = np.abs(palette.astype(np.float64) - weights.astype(np.float64)[:, None])  # [V, entries]
    assert (distances[np.arange(len(weights)), indices] == distances.min(axis=1)).all()


def test_few_values_are_kept_exactly():
    weights = np.array([[0.5, -1], [2, 0.5]], np.float16)
    palette, indices = palettize(weights, 2)
    assert palette.tolist() == [-1, 0.5, 2, 2]
    assert (palette[indices].reshape(2, 2) == weights).all()


def test_more_values_than_bins_lose_little():
    weights = RNG.standard_normal(30_000)
    assert len(np.unique(weights)) > MAX_VALUES
    share = error(weights, *palettize(weights, 4)) / (weights**2).sum()
    assert share < 0.0096  # the best 16 levels for a normal distribution leave 0.009497 (Max 1960, table I)


def test_the_same_weights_give_the_same_palette_in_any_order():
    weights = RNG.standard_normal(5000).astype(np.float16)
    assert (palettize(weights, 6)[0] == palettize(RNG.permutation(weights), 6)[0]).all()


def test_equal_weights_count_each():
    values, counts = np.array([0.0, 1.0]), np.array([3, 1])
    assert squared_error(values, counts, np.array([0.25, 0.25])) == pytest.approx(3 * 0.0625 + 0.5625)


@pytest.mark.parametrize(
    ("weights", "num_bits", "message"),
    [
        (np.zeros(3), 5, r"index has 1, 2, 3, 4, 6, 8 bits, got 5"),
        (np.array([1, np.nan]), 4, "needs finite weights"),
    ],
)
def test_what_cannot_be_palettized_is_named(weights, num_bits, message):
    with pytest.raises(ConversionError, match=message):
        palettize(weights, num_bits)
