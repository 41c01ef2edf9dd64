"""Arrays in .npz files, and the named sets of the data folder."""

import io
import lzma
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from host.data.npz import read_npz
from host.data.packed import PackedJpegs
from host.data.sources import data_folder, load_splits
from host.data.spec import DataSpec
from host.data.splits import ImageSplits, class_counts
from host.errors import DataError
from tests.support.images import numbered_images, parts_of


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def load(path: Path, **table: object) -> ImageSplits:
    return load_splits(DataSpec(source=f"npz:{path}", **table), seed=0)


def keras_arrays(count: int = 20, **changes: object) -> dict[str, object]:
    labels = np.arange(count) % 2
    images = numbered_images(count)
    return {"x_train": images, "y_train": labels, "x_test": images[:4], "y_test": labels[:4], **changes}


def test_arrays_stay_arrays_and_given_splits_stay(tmp_path):
    splits = load(save(tmp_path / "set.npz", **keras_arrays(label_names=np.array(["cat", "dog"]))))
    assert (splits.label_names, splits.channels, splits.terms) == (("cat", "dog"), 3, "unknown")
    assert class_counts(splits) == [("cat", 9, 1, 0, 2), ("dog", 9, 1, 0, 2)]
    assert all(isinstance(part.images, np.ndarray) for part in parts_of(splits).values())
    np.testing.assert_array_equal(splits.test.images, numbered_images(20)[:4])
    for part in (splits.train, splits.validation):
        np.testing.assert_array_equal(part.images[:, 0, 0, 1] % 2, part.labels)
    assert splits.description.startswith("set.npz: 18 images to train")


def test_images_and_labels_alone_are_split(tmp_path):
    path = save(tmp_path / "set.npz", images=numbered_images(30)[..., 0], labels=np.arange(30, dtype=np.uint8) % 3)
    splits = load(path, test_share=0.5)
    assert (splits.label_names, splits.channels, splits.train.images.shape[1:]) == (("0", "1", "2"), 1, (2, 2, 1))
    assert class_counts(splits)[0] == ("0", 4, 1, 0, 5)


def test_validation_arrays_and_columns_of_labels_are_read(tmp_path):
    arrays = keras_arrays(x_val=numbered_images(6), y_val=(np.arange(6) % 2)[:, None])
    splits = load(save(tmp_path / "set.npz", **arrays))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 6, 4)


def test_compressed_files_are_read_alike(tmp_path):
    path = save(tmp_path / "set.npz", **keras_arrays())
    compressed = tmp_path / "set.npz.xz"
    compressed.write_bytes(lzma.compress(path.read_bytes()))
    np.testing.assert_array_equal(load(path).train.images, load(compressed).train.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_train": numbered_images(20) / 255},
            r"x_train must be uint8 .* got float64 \[20, 2, 2, 3\]; scale to 0..255",
        ),
        ({"x_train": numbered_images(20)[..., :2]}, r"got uint8 \[20, 2, 2, 2\]"),
        ({"x_train": numbered_images(20)[:0]}, r"got uint8 \[0, 2, 2, 3\]"),
        ({"x_train": np.array([None] * 20)}, "cannot be read as .npz .*allow_pickle"),
        ({"y_train": np.arange(19) % 2}, r"y_train must be integers \[20\], one per image, got int64 \[19\]"),
        ({"y_train": np.arange(20) / 2}, "got float64"),
        ({"y_train": np.arange(20) % 2 - 1}, "y_train holds -1, but labels are 0..0"),
        ({"y_train": np.arange(20) * 10**12}, "y_train holds 19000000000000, but labels are 0..19"),
        ({"y_test": np.arange(4)}, "y_test holds 3, but labels are 0..1"),
        ({"y_train": np.arange(20) % 2 * 2}, "class '1' has no image in train"),
        ({"x_test": numbered_images(4)[..., 0]}, "the splits differ in channels"),
        ({"label_names": np.array(["cat", "cat"])}, "label_names must be different strings"),
        ({"label_names": np.array([3, 4])}, "label_names must be different strings"),
        ({"x_valid": numbered_images(4)}, "unknown x_valid; an .npz holds x_train"),
        ({"images": numbered_images(4)}, "missing labels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load(save(tmp_path / "set.npz", **keras_arrays(**changes)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "cannot be read as .npz"),
        (b"PK\x03\x04 cut off", "cannot be read as .npz"),
        (pickle.dumps("anything"), "cannot be read as .npz"),
    ],
)
@pytest.mark.parametrize("name", ["set.npz", "set.npz.xz"])
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_npz(tmp_path / name)


def test_one_array_is_no_npz(tmp_path):
    np.save(tmp_path / "set.npy", numbered_images(4))
    (tmp_path / "set.npy").rename(tmp_path / "set.npz")
    with pytest.raises(DataError, match=r"one array, not an .npz"):
        read_npz(tmp_path / "set.npz")


def test_packed_jpegs_are_headers_and_contents_put_together():
    files = []
    for value in (10, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    contents = [file[20:] for file in files]
    packed = PackedJpegs(
        content=np.frombuffer(b"".join(contents), np.uint8),
        offsets=np.cumsum([0, *map(len, contents)]),
        headers=(b"unused", files[0][:20]),
        header_of=np.array([1, 1], np.uint8),
    )
    assert [packed.encoded(index) for index in range(len(packed))] == files
    for index, value in enumerate((10, 200)):
        np.testing.assert_allclose(packed[index], value, atol=3)


def test_a_missing_set_says_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FIELDVIT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"cifar10_jpeg75.npz is missing; name the folder .* in FIELDVIT_DATA"):
        load_splits(DataSpec(source="cifar10-jpeg75"), seed=0)


def load_named(name: str, file: str, **table: object) -> ImageSplits:
    if not (data_folder() / file).is_file():
        pytest.skip(f"{file} is not in the data folder (FIELDVIT_DATA)")
    return load_splits(DataSpec(source=name, **table), seed=0)


def test_cifar10_jpeg75_is_read_without_decoding():
    load_named("cifar10-jpeg75", "cifar10_jpeg75.npz")
    start = time.process_time()
    splits = load_named("cifar10-jpeg75", "cifar10_jpeg75.npz")
    assert time.process_time() - start < 1
    assert class_counts(splits)[0] == ("airplane", 4500, 500, 0, 1000)
    image = splits.train.images[0]
    assert (image.shape, image.dtype, splits.channels) == ((32, 32, 3), np.uint8, 3)
    assert "JPEG q75" in splits.description
    assert "research only" in splits.description


def test_cifar10_lt_has_the_published_counts_without_touching_the_test_set():
    splits = load_named("cifar10-jpeg75", "cifar10_jpeg75.npz", imbalance=100.0)
    rows = class_counts(splits)
    assert [row.train for row in rows] == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert [row.validation for row in rows] == [0] + [500] * 9
    assert {row.test for row in rows} == {1000}


def test_tiny_imagenet100_tests_on_the_official_validation_images():
    splits = load_named("tiny-imagenet100", "tiny_imagenet100.npz", held_back=("50..99",))
    assert (splits.num_base, len(splits.label_names), len(splits.test)) == (50, 100, 5000)
    assert class_counts(splits)[0][1:] == (225, 25, 0, 50)
    assert class_counts(splits)[99][1:] == (0, 0, 250, 50)
    assert all(splits.test.images[index].shape == (64, 64, 3) for index in range(0, 5000, 100))  # grey ones among them


def test_mnist_is_grey():
    splits = load_named("mnist", "mnist.npz.xz")
    assert (splits.channels, splits.train.images.shape[1:], len(splits.test)) == (1, (28, 28, 1), 10_000)
    assert splits.terms == "CC BY-SA 3.0"
