"""Laws of the splits, whatever the source brings: disjoint, complete, by class, and the test set in no choice."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.data.longtail import long_tail_counts
from host.data.spec import DataSpec
from host.data.splits import Chosen, ClassCounts, ImageSplits, LabeledImages, Source, class_counts, split_source
from host.errors import DataError
from tests.support.images import parts_of


def make_source(counts: list[int], *, test: list[int] | None = None, validation: list[int] | None = None) -> Source:
    """Images whose pixels hold their number; numbers go on from train to validation to test."""
    parts, first = {}, 0
    for part, of_class in (("train", counts), ("validation", validation), ("test", test)):
        if of_class is None:
            continue
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(of_class)), of_class))
        images = np.arange(first, first + len(labels), dtype=np.int64).view(np.uint8).reshape(-1, 2, 4, 1)
        parts[part] = LabeledImages(images=images, labels=labels)
        first += len(labels)
    names = tuple("abcdefghij"[: len(counts)])
    return Source(title="letters", terms="unknown", label_names=names, channels=1, **parts)


def numbers_of(images: LabeledImages) -> list[int]:
    return [int.from_bytes(image.tobytes(), sys.byteorder) for image in images.images]


def split(source: Source, *, seed: int = 0, **table: object) -> ImageSplits:
    return split_source(source, DataSpec(source="npz:letters.npz", **table), seed=seed)


sources = st.builds(
    make_source,
    st.lists(st.integers(4, 40), min_size=3, max_size=3),
    test=st.none() | st.just([2, 3, 4]),
    validation=st.none() | st.just([3, 1, 2]),
)


@given(sources, st.sampled_from([(), ("a",), ("c",)]), st.integers(0, 2))
def test_every_image_is_in_one_part_and_keeps_its_class(source, held_back, seed):
    parts = parts_of(splits := split(source, held_back=held_back, seed=seed))
    class_of = {
        number: source.label_names[label]
        for part in (source.train, source.validation, source.test)
        if part is not None
        for number, label in zip(numbers_of(part), part.labels, strict=True)
    }
    found = [number for part in parts.values() for number in numbers_of(part)]
    assert len(set(found)) == len(found)
    not_used = {} if source.validation is None else {n for n in class_of if class_of[n] in held_back}
    assert set(class_of) - set(found) <= set(not_used)  # validation images of held-back classes serve nothing
    for part in parts.values():
        names = [splits.label_names[label] for label in part.labels]
        assert names == [class_of[number] for number in numbers_of(part)]


@given(sources, st.sampled_from([(), ("a",), ("c",)]))
def test_parts_have_their_classes_and_given_splits_stay(source, held_back):
    splits = split(source, held_back=held_back)
    base, all_classes = set(range(splits.num_base)), set(range(3))
    assert splits.label_names[splits.num_base :] == held_back
    assert set(splits.train.labels) == set(splits.validation.labels) == base
    assert set(splits.field.labels) == all_classes - base
    assert set(splits.test.labels) == all_classes
    if source.test is not None:
        assert numbers_of(splits.test) == numbers_of(source.test)
    if source.validation is not None:
        assert set(numbers_of(splits.validation)) <= set(numbers_of(source.validation))


@given(sources, st.integers(0, 3))
def test_split_depends_on_the_seed_alone(source, seed):
    first, second = (parts_of(split(source, seed=seed)) for _ in range(2))
    assert {n: numbers_of(p) for n, p in first.items()} == {n: numbers_of(p) for n, p in second.items()}


@given(st.integers(4, 200), st.floats(0.05, 0.6), st.floats(0.05, 0.6))
def test_shares_are_what_the_recipe_says(count, test_share, validation_share):
    splits = split(make_source([count] * 3), test_share=test_share, validation_share=validation_share)
    num_test = max(round(count * test_share), 1)
    num_validation = max(round((count - num_test) * validation_share), 1)
    assert class_counts(splits)[0] == ("a", count - num_test - num_validation, num_validation, 0, num_test)


@given(st.lists(st.integers(10, 60), min_size=3, max_size=3), st.floats(1.5, 5))
def test_long_tail_is_cut_from_all_training_images_and_validation_from_the_rest(counts, imbalance):
    source = make_source(counts, test=[2, 2, 2])
    kept = long_tail_counts(np.array(counts), imbalance)
    if (kept == counts).all():
        return
    splits = split(source, imbalance=imbalance)
    np.testing.assert_array_equal(np.bincount(splits.train.labels), kept)
    expected = np.minimum([max(round(n * 0.1), 1) for n in counts], np.array(counts) - kept)
    np.testing.assert_array_equal(np.bincount(splits.validation.labels, minlength=3), expected)
    assert not set(numbers_of(splits.train)) & set(numbers_of(splits.validation))


def test_a_validation_share_comes_before_the_tail_and_is_balanced():
    splits = split(make_source([50] * 3, test=[2] * 3), imbalance=10.0, validation_share=0.2)
    assert [row[1:3] for row in class_counts(splits)] == [(40, 10), (12, 10), (4, 10)]


def test_long_tail_does_not_touch_the_field_nor_a_given_validation_split():
    splits = split(make_source([50] * 3, test=[2] * 3, validation=[5] * 3), imbalance=10.0, held_back=("a",))
    assert class_counts(splits) == [("b", 50, 5, 0, 2), ("c", 5, 5, 0, 2), ("a", 0, 0, 50, 2)]


def test_a_tail_that_leaves_nothing_to_choose_by_is_refused():
    with pytest.raises(
        DataError, match=r"imbalance of 1\.001 leaves no images to choose by; set data.validation_share"
    ):
        split(make_source([50, 3, 1], test=[1] * 3), imbalance=1.001)


def test_description_says_what_and_how_many():
    splits = split(replace(make_source([50] * 3), skipped=("x.jpg",)), imbalance=10.0, held_back=("c",))
    assert splits.description == (
        "letters: 44 images to train, 4 to choose, 30 to test; held back for the field: c; long tail of imbalance 10: "
        "40 to 4 training images a class, which leaves none to choose by for a; "
        "images left out because they cannot be decoded: 1"
    )
    assert class_counts(splits)[2] == ClassCounts("c", train=0, validation=0, field=40, test=10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (make_source([9]), "letters: 1 class .a., but a classifier needs at least 2"),
        (make_source([9, 0, 9]), "class 'b' has no image in train"),
        (make_source([9, 9], test=[1, 0]), "class 'b' has no image in test.*or remove the split"),
        (make_source([9, 9], validation=[0, 1]), "class 'a' has no image in validation"),
        (make_source([9, 2]), "class 'b' has 2 images, too few"),
        (replace(make_source([9, 9]), label_names=("a", "a")), "two classes are called 'a'"),
    ],
)
def test_sources_that_cannot_be_split_are_refused(source, message):
    with pytest.raises(DataError, match=message):
        split(source)


def test_taking_from_a_collection_reads_nothing():
    class Unreadable:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> np.ndarray:
            raise AssertionError("read")

    images = LabeledImages(images=Unreadable(), labels=np.arange(10), blocks=np.arange(10) // 5)
    taken = images.take(np.array([7, 3, 1])).take(np.array([2, 0]))
    assert isinstance(taken.images, Chosen)
    assert (taken.images.indices.tolist(), taken.labels.tolist(), taken.blocks.tolist()) == ([1, 7], [1, 7], [0, 1])
    assert taken.take(np.array([False, True])).labels.tolist() == [7]


def test_taking_from_an_array_gives_an_array():
    source = make_source([3, 3]).train
    taken = source.take(source.labels == 1)
    assert isinstance(taken.images, np.ndarray)
    assert (len(taken), set(taken.labels), taken.blocks) == (3, {1}, None)
