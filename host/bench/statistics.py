"""Percentiles of latencies, and how sure the ratio of two medians is."""

from typing import NamedTuple

import numpy as np

from host.bench.measure import Times

RESAMPLES = 1000
SEED = 0


class Ratio(NamedTuple):
    """A ratio of medians and its 95 % interval."""

    value: float
    low: float
    high: float


def percentiles_ms(seconds: np.ndarray) -> tuple[float, float, float]:
    """p50, p90 and p99 in milliseconds."""
    p50, p90, p99 = np.percentile(seconds * 1e3, [50, 90, 99])
    return float(p50), float(p90), float(p99)


def ratio_of_medians(seconds: np.ndarray, base: np.ndarray) -> Ratio:
    """The median of `seconds` in that of `base`, both float [n] and taken in the same rounds.

    The interval is a paired block bootstrap: a slow moment of the machine lasts longer than a query and slows both, so
    whole stretches of n^(1/3) rounds, the usual length, are drawn for both at once.
    """
    rng = np.random.default_rng(SEED)
    length = round(len(seconds) ** (1 / 3))
    blocks = np.array_split(np.arange(len(seconds)), -(-len(seconds) // length))
    ratios = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        rounds = np.concatenate([blocks[block] for block in rng.integers(len(blocks), size=len(blocks))])
        ratios[index] = np.median(seconds[rounds]) / np.median(base[rounds])
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(float(np.median(seconds) / np.median(base)), float(low), float(high))


def waiting(times: Times) -> float:
    """Wall time of all queries in their processor time: 1 where the processor was theirs alone, on one thread."""
    return float(times.wall.sum() / max(times.processor.sum(), 1e-9))
