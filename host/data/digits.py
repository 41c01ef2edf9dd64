"""scikit-learn's digits: 1,797 real 8 x 8 images of handwritten digits. They come with the package: nothing is fetched.

Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI (the test part of it).
"""

from collections.abc import Sequence

import numpy as np

from host.data.spec import DataSpec
from host.data.splits import ImageSplits, LabeledImages, Source, split_source

NAMES = tuple("0123456789")
_LARGEST_VALUE = 16


def read_digits() -> Source:
    """The digits, images uint8 [1797, 8, 8, 1], 0..255; half of them become test images."""
    from sklearn.datasets import load_digits  # half a second, and only this function needs it

    digits = load_digits()
    images = np.rint(digits.images * (255 / _LARGEST_VALUE)).astype(np.uint8)[..., None]
    return Source(
        title="scikit-learn digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
        terms="CC BY 4.0",
        label_names=NAMES,
        channels=1,
        train=LabeledImages(images=images, labels=digits.target.astype(np.int64)),
        test_share=0.5,
        validation_share=0.2,
    )


def load_digits_split(seed: int, *, held_back: Sequence[str] = ("8", "9")) -> ImageSplits:
    """The digits, half of them for the test; the held-back ones are learned in the field.

    Raises:
        RecipeError: not a digit, given twice, or fewer than two are left for training.
    """
    return split_source(read_digits(), DataSpec(source="digits", held_back=tuple(held_back)), seed=seed)
