"""scikit-learn's digits: 1,797 real 8 x 8 images of handwritten digits. They come with the package: nothing is fetched.

Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI (the test part of it).
"""

from collections.abc import Sequence

import numpy as np

from host.data.splits import ImageSplits, split_images
from host.errors import DataError

NAMES = tuple("0123456789")
_LARGEST_VALUE = 16


def load_digits_split(seed: int, *, held_back: Sequence[str] = ("8", "9")) -> ImageSplits:
    """The digits, half of them for the test; the held-back ones are learned in the field.

    Args:
        seed: of the split.
        held_back: digits that training does not see; their labels come after those of the others.

    Returns:
        Images uint8 [N, 8, 8, 1], 0..255.

    Raises:
        DataError: not a digit, given twice, or fewer than two are left for training.
    """
    unknown = [name for name in held_back if name not in NAMES]
    if unknown or len(set(held_back)) != len(held_back) or len(NAMES) - len(held_back) < 2:
        raise DataError(f"held_back must be different digits and leave two, got {', '.join(held_back)}")
    base = tuple(name for name in NAMES if name not in held_back)
    label_names = base + tuple(held_back)
    images, digits = _read_digits()
    position = np.array([label_names.index(name) for name in NAMES])
    return split_images(images, position[digits], label_names=label_names, num_base=len(base), seed=seed)


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # half a second, and only this function needs it

    digits = load_digits()
    images = np.rint(digits.images * (255 / _LARGEST_VALUE)).astype(np.uint8)[..., None]  # [N, 8, 8, 1]
    return images, digits.target.astype(np.int64)
