"""The palette of a tensor: the few values that stand for all its weights, chosen by k-means in one dimension.

In one dimension clusters are intervals of the sorted values, so the best ones are found by dynamic programming over
their ends instead of by trying random starts: the same weights give the same palette. More than `MAX_VALUES` distinct
values are first merged into as many even bins, and steps of Lloyd's algorithm over all values undo what that cost. The
even palette (coremltools' `uniform`) takes part as well, so the result is never further from the weights.

Sources: Wang and Song 2011, Ckmeans.1d.dp (The R Journal 3/2); its divide and conquer over monotone cluster starts as in
their version 4; Lloyd 1982, Least squares quantization in PCM. scikit-learn's k-means, which coremltools 9.0 would use,
is refused by it in the version that we pin.
"""

import numpy as np

from converters.errors import ConversionError

NUM_BITS = (1, 2, 3, 4, 6, 8)
"""Widths of an index that Core ML knows."""
MAX_VALUES = 4096
MAX_STEPS = 50


def palettize(weights: np.ndarray, num_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the palette with the least squared error.

    Args:
        weights: floats of any shape, finite.
        num_bits: 1, 2, 3, 4, 6 or 8.

    Returns:
        The palette [2**num_bits], ascending, in the type of the weights, and for each weight in row-major order the
        index uint8 [size] of the nearest entry.

    Raises:
        ConversionError: a weight is not finite, or no such width.
    """
    if num_bits not in NUM_BITS:
        raise ConversionError(f"a palette's index has {', '.join(map(str, NUM_BITS))} bits, got {num_bits}")
    if not np.isfinite(weights).all():
        raise ConversionError("a palette needs finite weights; train or convert the model again")
    distinct, counts = np.unique(weights, return_counts=True)  # [V] ascending
    values, size = distinct.astype(np.float64), 2**num_bits
    even = np.linspace(values[0], values[-1], size)
    candidates = (even, _lloyd(values, counts, _best_of_bins(values, counts, size)))
    palettes = [np.sort(candidate.astype(weights.dtype)) for candidate in candidates]
    palette = min(palettes, key=lambda found: squared_error(values, counts, found))
    return palette, nearest(palette, weights.reshape(-1)).astype(np.uint8)


def nearest(palette: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of the nearest entry of an ascending palette for each value; the lower one of two as near."""
    entries = palette.astype(np.float64)
    return np.searchsorted((entries[1:] + entries[:-1]) / 2, values.astype(np.float64))


def squared_error(values: np.ndarray, counts: np.ndarray, palette: np.ndarray) -> float:
    """The sum over all weights of the squared distance to their palette; distinct values [V] with counts [V]."""
    return float((counts * (values - palette.astype(np.float64)[nearest(palette, values)]) ** 2).sum())


def _best_of_bins(values: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """The best palette of the values, or of the means of `MAX_VALUES` even bins where there are more."""
    if len(values) > MAX_VALUES:
        edges = np.linspace(values[0], values[-1], MAX_VALUES + 1)
        bins = np.searchsorted(edges[1:-1], values, side="right")
        numbers = np.bincount(bins, counts)
        used = numbers > 0
        values, counts = np.bincount(bins, counts * values)[used] / numbers[used], numbers[used]
    means = values if len(values) <= size else _Intervals(values, counts).best_means(size)
    return np.pad(means, (0, size - len(means)), mode="edge")


class _Intervals:
    """Sums over intervals [start, end) of ascending values, and the best division of all values into intervals."""

    def __init__(self, values: np.ndarray, counts: np.ndarray) -> None:
        self._middle = float(np.average(values, weights=counts))  # sums around it lose fewer digits
        centred = values - self._middle
        self._number, self._sum, self._square = (
            np.concatenate(([0.0], np.cumsum(counts * centred**power))) for power in (0, 1, 2)
        )

    def best_means(self, size: int) -> np.ndarray:
        """The means of the `size` intervals with the least squared error; fewer where one more would not lower it."""
        ends = np.arange(len(self._number))
        errors = self._error(np.zeros_like(ends), ends)  # of the first e values in one interval
        starts = []
        for _ in range(size - 1):
            errors, chosen = self._one_more(errors)
            starts.append(chosen)
        bounds = [int(ends[-1])]
        for chosen in reversed(starts):
            bounds.append(int(chosen[bounds[-1]]))
        return self._means(np.unique([0, *bounds]))

    def _one_more(self, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Least errors of the first e values with one interval more, and where that interval starts, for every e.

        The start never moves left as e grows: each halving of the distance between the ends that are solved looks only
        between the starts of its two neighbours.
        """
        last = len(errors) - 1
        best, chosen = np.zeros(last + 1), np.zeros(last + 1, np.int64)
        step = 1 << last.bit_length()
        while step := step // 2:
            ends = np.arange(step, last + 1, 2 * step)
            low = chosen[ends - step]
            right = ends + step
            high = np.where(right <= last, chosen[np.minimum(right, last)], last)
            lengths = np.minimum(high, ends - 1).clip(low) - low + 1
            offsets = np.cumsum(lengths) - lengths
            start = np.arange(lengths.sum()) + np.repeat(low - offsets, lengths)
            found = errors[start] + self._error(start, np.repeat(ends, lengths))
            best[ends] = np.minimum.reduceat(found, offsets)
            hits = np.flatnonzero(found == np.repeat(best[ends], lengths))
            chosen[ends] = start[hits[np.searchsorted(hits, offsets)]]
        return best, chosen

    def _error(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        number = np.maximum(self._number[end] - self._number[start], 1e-300)
        total = self._sum[end] - self._sum[start]
        return np.maximum(self._square[end] - self._square[start] - total**2 / number, 0.0)

    def _means(self, bounds: np.ndarray) -> np.ndarray:
        return self._middle + np.diff(self._sum[bounds]) / np.diff(self._number[bounds])


def _lloyd(values: np.ndarray, counts: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Move every entry to the mean of the values nearest to it until none moves; an entry without values stays."""
    total = np.concatenate(([0.0], np.cumsum(counts * values)))
    number = np.concatenate(([0.0], np.cumsum(counts.astype(np.float64))))
    for _ in range(MAX_STEPS):
        inner = np.searchsorted(values, (palette[1:] + palette[:-1]) / 2, side="right")
        edges = np.concatenate(([0], inner, [len(values)]))
        sizes = np.diff(number[edges])
        moved = np.sort(np.where(sizes > 0, np.diff(total[edges]) / np.maximum(sizes, 1), palette))
        if np.array_equal(moved, palette):
            break
        palette = moved
    return palette
