"""Long-tailed subsets and class-incremental streams: laws over generated labels, and published counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from host.data.longtail import long_tail, long_tail_counts
from host.data.streams import class_incremental
from host.errors import DataError

labels_of_all_classes = st.integers(1, 6).flatmap(
    lambda k: arrays(np.int64, st.integers(k, 60), elements=st.integers(0, k - 1)).map(
        lambda labels: np.concatenate([np.arange(k), labels])
    )
)


@pytest.mark.parametrize(
    ("imbalance", "counts", "total"),  # CIFAR-10-LT as the literature trains on it
    [
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], 12406),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500], 20431),
        (1, [5000] * 10, 50000),
    ],
)
def test_counts_of_cifar10_lt_are_the_published_ones(imbalance, counts, total):
    chosen = long_tail(np.tile(np.arange(10), 5000), imbalance, seed=0)
    found = np.bincount(np.tile(np.arange(10), 5000)[chosen])
    assert (found.tolist(), len(chosen)) == (counts, total)


def test_counts_of_cifar100_lt_are_the_published_ones():
    counts = long_tail_counts(np.full(100, 500), 100)
    assert (counts[0], counts[-1], counts.sum()) == (500, 5, 10847)


@given(labels_of_all_classes, st.floats(1, 4), st.integers(0, 3))
def test_long_tail_falls_and_takes_each_image_at_most_once(labels, imbalance, seed):
    counts = np.bincount(labels)
    if counts.max() < imbalance:
        return
    chosen = long_tail(labels, imbalance, seed=seed)
    kept = np.bincount(labels[chosen])
    assert (np.diff(chosen) > 0).all()
    assert (kept <= counts).all()
    np.testing.assert_array_equal(kept, long_tail_counts(counts, imbalance))
    if (counts == counts[0]).all():
        assert (np.diff(kept) <= 0).all()
        assert kept[0] == counts[0]
    np.testing.assert_array_equal(chosen, long_tail(labels, imbalance, seed=seed))


@given(st.integers(2, 12), st.integers(1, 50), st.integers(2, 9))
def test_head_over_tail_is_the_imbalance(num_classes, tail, imbalance):
    kept = long_tail_counts(np.full(num_classes, tail * imbalance), imbalance)
    assert (kept[0], kept[-1]) == (tail * imbalance, tail)


def test_choice_depends_on_the_seed():
    labels = np.repeat([0, 1], 50)
    assert (long_tail(labels, 5, seed=0) != long_tail(labels, 5, seed=1)).any()


def test_a_tail_of_nothing_is_refused():
    with pytest.raises(DataError, match=r"imbalance of 100 leaves class number 2 without images.* to 20 or less"):
        long_tail_counts(np.array([20, 20, 20]), 100)


@given(labels_of_all_classes, st.data())
def test_experiences_part_the_images_by_class_and_keep_the_order(labels, data):
    order = data.draw(st.permutations(range(labels.max() + 1)))
    size = data.draw(st.integers(1, len(order)))
    how = data.draw(st.sampled_from(["num_experiences", "classes_per_experience"]))
    stream = class_incremental(labels, order=order, **{how: size})
    assert [c for experience in stream for c in experience.classes] == order
    np.testing.assert_array_equal(np.sort(np.concatenate([e.indices for e in stream])), np.arange(len(labels)))
    for experience in stream:
        assert set(labels[experience.indices]) == set(experience.classes)
        assert (np.diff(experience.indices) > 0).all()
    sizes = [len(experience.classes) for experience in stream]
    if how == "num_experiences":
        assert (len(sizes), max(sizes) - min(sizes) <= 1) == (size, True)
    else:
        assert (set(sizes[:-1]) <= {size}, sizes[-1] <= size) == (True, True)


def test_ten_experiences_of_ten_classes_come_in_label_order():
    stream = class_incremental(np.arange(100).repeat(3), num_experiences=10)
    assert [experience.classes for experience in stream] == [tuple(range(i, i + 10)) for i in range(0, 100, 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_experiences or classes_per_experience"),
        ({"num_experiences": 2, "classes_per_experience": 2}, "not both"),
        ({"num_experiences": 4}, "a stream of 3 classes cannot have 4"),
        ({"classes_per_experience": 0}, "cannot have 0"),
        ({"num_experiences": 2, "order": [0, 1]}, "order must name each of the 3 classes"),
        ({"num_experiences": 2, "order": [0, 1, 1]}, "order must name each"),
    ],
)
def test_streams_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        class_incremental(np.array([0, 1, 2, 2]), **arguments)
