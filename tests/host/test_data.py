"""The digits' splits and the augmentation."""

import hashlib

import numpy as np
import pytest
import torch

from host.data.augment import augment, quarter_turns
from host.data.digits import load_digits_split
from host.data.splits import ImageSplits
from host.errors import RecipeError

PARTS = ("train", "validation", "field", "test")
DIGESTS = {"train": "d7a5c01e", "validation": "7d626f4f", "field": "d6036796", "test": "527c5386"}


@pytest.fixture(scope="module")
def split() -> ImageSplits:
    return load_digits_split(0)


def test_every_image_is_in_exactly_one_part(split):
    from sklearn.datasets import load_digits

    images = np.concatenate([getattr(split, part).images for part in PARTS])
    expected = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    rows = [np.sort(array.reshape(1797, 64).view("S64").ravel()) for array in (images, expected)]
    np.testing.assert_array_equal(*rows)


def test_parts_hold_their_classes(split):
    assert split.label_names == tuple("0123456789")
    assert split.base_names == tuple("01234567")
    assert set(split.train.labels) == set(split.validation.labels) == set(split.base_labels)
    assert set(split.field.labels) == {8, 9}
    assert set(split.test.labels) == set(range(10))


def test_parts_are_stratified(split):
    share = np.bincount(split.test.labels) / sum(np.bincount(getattr(split, p).labels, minlength=10) for p in PARTS)
    np.testing.assert_allclose(share, 0.5, atol=0.01)
    assert np.bincount(split.validation.labels).min() >= 17  # the guard on the board needs some of every class


def test_split_depends_on_the_seed_alone(split):
    for part in PARTS:
        np.testing.assert_array_equal(getattr(load_digits_split(0), part).images, getattr(split, part).images)
    assert (load_digits_split(1).test.labels != split.test.labels).any()


def test_held_back_labels_come_last():
    split = load_digits_split(0, held_back=("1", "3"))
    assert split.label_names == tuple("0245678913")
    assert set(split.field.labels) == {8, 9}
    assert set(split.train.labels) == set(range(8))


@pytest.mark.parametrize(
    ("held_back", "message"),
    [(("x",), "no class 'x'"), (("1", "1"), "names a class twice"), (tuple("012345678"), "leaves 1 of 10 classes")],
)
def test_bad_held_back_is_refused(held_back, message):
    with pytest.raises(RecipeError, match=message):
        load_digits_split(0, held_back=held_back)


def test_split_of_seed_0_is_the_one_that_published_figures_were_measured_on(split):
    # printed by the first version of this split: a change would make old figures incomparable
    digests = {part: hashlib.sha256(getattr(split, part).images.tobytes()).hexdigest()[:8] for part in PARTS}
    assert digests == DIGESTS


def make_batch() -> torch.Tensor:
    return torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5


def test_augment_draws_from_its_generator_alone():
    first, second = (augment(make_batch(), torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, augment(make_batch(), torch.Generator().manual_seed(4)))


def test_augment_keeps_the_range_and_at_strength_zero_the_images():
    images = make_batch()
    distorted = augment(images, torch.Generator().manual_seed(0))
    assert distorted.min() >= images.min() - 1e-6
    assert distorted.max() <= images.max() + 1e-6
    unchanged = augment(images, torch.Generator().manual_seed(0), strength=0.0)
    torch.testing.assert_close(unchanged, images, rtol=0, atol=1e-5)


def test_quarter_turns_turn_each_image_by_its_own_number():
    images = make_batch()
    turned = quarter_turns(images, torch.tensor([0, 1, 2, 3, 0, 1]))
    for index, turns in enumerate([0, 1, 2, 3, 0, 1]):
        assert torch.equal(turned[index], torch.rot90(images[index], turns, (1, 2)))
