"""SLDA: laws of the statistics, then that something is learned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from device.contract.errors import LearningError
from device.learning.slda import SLDA, UNTAUGHT_BIAS

K, D = 3, 4
SHRINKAGE = 0.03

counts = st.integers(1, 24)
features_and_labels = counts.flatmap(
    lambda n: st.tuples(
        arrays(np.float32, (n, D), elements=st.floats(-100, 100, width=32)),
        arrays(np.int64, n, elements=st.integers(0, K - 1)),
    )
)


def learned(features: np.ndarray, labels: np.ndarray, num_classes: int = K) -> SLDA:
    slda = SLDA(num_classes, features.shape[1], shrinkage=SHRINKAGE)
    slda.update(features, labels)
    return slda


def gaussians(per_class: int, num_classes: int, seed: int, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Classes around fixed means with one correlated covariance."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    means, mixing = 4 * fixed.standard_normal((num_classes, dim)), fixed.standard_normal((dim, dim))
    labels = np.repeat(np.arange(num_classes), per_class)
    return means[labels] + rng.standard_normal((len(labels), dim)) @ mixing, labels


def assert_same_statistics(left: SLDA, right: SLDA) -> None:
    for name, array in left.state().items():
        np.testing.assert_allclose(array, right.state()[name], rtol=1e-12, atol=1e-7, err_msg=name)


@settings(max_examples=50, deadline=None)  # a busy machine is no failure
@given(features_and_labels, st.randoms(use_true_random=False))
def test_order_and_batches_do_not_matter(samples, random):
    features, labels = samples
    order = random.sample(range(len(labels)), len(labels))
    one_by_one = SLDA(K, D, shrinkage=SHRINKAGE)
    for index in order:
        one_by_one.update(features[[index]], labels[[index]])
    assert_same_statistics(one_by_one, learned(features, labels))


@settings(max_examples=50, deadline=None)  # a busy machine is no failure
@given(features_and_labels, features_and_labels)
def test_merged_boards_equal_one_board_that_saw_everything(here, there):
    merged = learned(*here)
    merged.merge(learned(*there))
    together = learned(np.concatenate([here[0], there[0]]), np.concatenate([here[1], there[1]]))
    assert_same_statistics(merged, together)


@settings(max_examples=50, deadline=None)  # a busy machine is no failure
@given(features_and_labels)
def test_covariance_is_the_batch_covariance_within_classes(samples):
    features, labels = samples
    scatter = sum(np.cov(features[labels == k].T, bias=True) * (labels == k).sum() for k in np.unique(labels))
    np.testing.assert_allclose(learned(features, labels).covariance(), scatter / len(labels), rtol=1e-6, atol=1e-6)


def test_covariance_equals_the_class_count_recursion():
    features, labels = gaussians(30, 5, seed=1)
    sigma, means, seen = np.zeros((8, 8)), np.zeros((5, 8)), np.zeros(5)
    for total, (z, y) in enumerate(zip(features, labels, strict=True)):
        difference = z - means[y]
        sigma = (total * sigma + seen[y] / (seen[y] + 1) * np.outer(difference, difference)) / (total + 1)
        means[y], seen[y] = (seen[y] * means[y] + z) / (seen[y] + 1), seen[y] + 1
    np.testing.assert_allclose(learned(features, labels, 5).covariance(), sigma, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)  # a busy machine is no failure
@given(st.floats(-1e6, 1e6), st.integers(1, 20))
def test_identical_samples_give_a_finite_head(value, count):
    slda = learned(np.full((count, D), value), np.zeros(count, np.int64))
    weight, bias = slda.linear()
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()


@settings(max_examples=50, deadline=None)  # a busy machine is no failure
@given(features_and_labels)
def test_state_round_trip_is_exact_and_shares_no_memory(samples):
    slda = learned(*samples)
    other = SLDA(1, D, shrinkage=SHRINKAGE)  # takes over the number of classes as well
    other.restore(slda.state())
    np.testing.assert_array_equal(other.linear()[0], slda.linear()[0])
    other.update(*samples)
    assert other.counts.sum() == 2 * slda.counts.sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_are_those_of_the_linear_head(dtype):
    features, labels = gaussians(20, 3, seed=2)
    slda = learned(features, labels)
    weight, bias = slda.linear()
    assert weight.dtype == bias.dtype == np.float32
    expected = features.astype(np.float32) @ weight + bias
    np.testing.assert_allclose(slda.logits(features.astype(dtype)), expected, rtol=1e-4, atol=1e-3)


def test_answers_survive_float16_where_classes_have_much_in_common():
    """Features far from zero give every class the same large logit; on a phone only differences may be left of it."""
    features, labels = gaussians(60, 5, seed=7)
    features = (features + 300).astype(np.float32)
    logits = learned(features, labels, num_classes=5).logits(features)
    assert (logits.astype(np.float16).argmax(axis=1) == logits.argmax(axis=1)).mean() >= 0.99


def test_untaught_class_cannot_win_and_taught_class_can():
    features, labels = gaussians(20, 4, seed=3)
    slda = learned(features[labels < 3], labels[labels < 3])
    assert slda.add_class() == 3
    assert slda.linear()[1][3] == np.float32(UNTAUGHT_BIAS)
    assert (slda.logits(features).argmax(axis=1) != 3).all()
    slda.update(features[labels == 3], labels[labels == 3])
    assert (slda.logits(features[labels == 3]).argmax(axis=1) == 3).mean() > 0.9


def test_twenty_samples_of_a_new_class_are_enough():
    base, base_labels = gaussians(200, 5, seed=4)
    new, new_labels = gaussians(20, 6, seed=5)
    test, test_labels = gaussians(100, 6, seed=6)
    slda = learned(base, base_labels, num_classes=6)
    slda.update(new[new_labels == 5], new_labels[new_labels == 5])
    assert (slda.logits(test).argmax(axis=1) == test_labels).mean() > 0.95


def test_nothing_learned_gives_a_finite_head():
    weight, bias = SLDA(K, D, shrinkage=SHRINKAGE).linear()
    assert (weight == 0).all()
    assert (bias == np.float32(UNTAUGHT_BIAS)).all()


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((2, D + 1)), [0, 1], r"\[B, 4\]"),
        (np.full((1, D), np.nan), [0], "finite"),
        (np.zeros((2, D)), [0, K], "label 3 is outside 0..2"),
        (np.zeros((2, D)), [0, -1], "label -1 is outside 0..2"),
        (np.zeros((2, D)), [0], "labels must be 2 integers"),
        (np.zeros((1, D)), [0.0], "labels must be 1 integers"),
    ],
)
def test_bad_samples_are_refused_and_change_nothing(features, labels, message):
    slda = SLDA(K, D, shrinkage=SHRINKAGE)
    with pytest.raises(LearningError, match=message):
        slda.update(features, np.array(labels))
    assert not any(array.any() for array in slda.state().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": np.zeros((D + 1, D + 1))}, "another backbone"),
        ({"sums": np.full((K, D), np.inf)}, "finite"),
        ({"counts": np.full(K, -1)}, "0 or more"),
        ({"weight": np.zeros(1)}, "counts, sums and gram"),
    ],
)
def test_bad_state_is_refused(change, message):
    slda = SLDA(K, D, shrinkage=SHRINKAGE)
    with pytest.raises(LearningError, match=message):
        slda.restore(slda.state() | change)


def test_merge_refuses_other_classes():
    with pytest.raises(LearningError, match="cannot merge"):
        SLDA(K, D, shrinkage=SHRINKAGE).merge(SLDA(K + 1, D, shrinkage=SHRINKAGE))


def test_samples_taken_out_again_were_never_seen():
    rng = np.random.default_rng(11)
    features, labels = rng.standard_normal((30, 4)), rng.integers(0, 3, 30)
    whole, part = SLDA(3, 4, shrinkage=0.1), SLDA(3, 4, shrinkage=0.1)
    whole.update(features, labels)
    part.update(features[:20], labels[:20])
    taken = whole.without(features[20:], labels[20:])
    np.testing.assert_allclose(taken.logits(features), part.logits(features), rtol=1e-4, atol=1e-4)
    assert whole.counts.sum() == 30
