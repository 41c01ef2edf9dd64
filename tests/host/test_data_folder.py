"""Folders of photos: layouts, order, what is refused, and how pictures of all kinds are decoded."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from host.data.pictures import decode
from host.data.sources import load_splits
from host.data.spec import DataSpec
from host.data.splits import ImageSplits, class_counts
from host.errors import DataError
from tests.support.images import numbers, parts_of, write_photos


def load(path: Path, *, seed: int = 0, **table: object) -> ImageSplits:
    return load_splits(DataSpec(source=f"folder:{path}", **table), seed=seed)


def test_classes_are_folders_and_splits_come_by_fraction(tmp_path):
    splits = load(write_photos(tmp_path / "photos", {"dog": 20, "cat": 10}), held_back=())
    assert (splits.label_names, splits.channels, splits.terms, splits.skipped) == (("cat", "dog"), 3, "unknown", ())
    assert class_counts(splits) == [("cat", 7, 1, 0, 2), ("dog", 14, 2, 0, 4)]
    assert sorted(n for part in parts_of(splits).values() for n in numbers(part)) == list(range(30))
    assert all(
        (np.array(numbers(part)) < 20).tolist() == (part.labels == 1).tolist() for part in parts_of(splits).values()
    )
    assert splits.train.images[0].shape == (4, 6, 3)
    assert "folder 'photos': 21 images to train" in splits.description
    assert str(tmp_path) not in splits.description


def test_train_val_and_test_folders_are_the_splits(tmp_path):
    for first, name in enumerate(["Train", "VALID", "test"]):
        write_photos(tmp_path / name, {"cat": 4, "dog": 4}, first=10 * first)
    (tmp_path / "annotations").mkdir()
    splits = load(tmp_path)
    assert {n: sorted(numbers(p)) for n, p in parts_of(splits).items()} == {
        "train": list(range(8)),
        "validation": list(range(10, 18)),
        "field": [],
        "test": list(range(20, 28)),
    }


def test_a_missing_validation_split_is_taken_from_training_images(tmp_path):
    write_photos(tmp_path / "train", {"cat": 10, "dog": 10})
    write_photos(tmp_path / "test", {"cat": 3, "dog": 3}, first=100)
    splits = load(tmp_path, validation_share=0.2)
    assert class_counts(splits) == [("cat", 8, 2, 0, 3), ("dog", 8, 2, 0, 3)]
    assert all(n >= 100 for n in numbers(splits.test))


def test_a_class_may_be_called_train(tmp_path):
    assert load(write_photos(tmp_path, {"bus": 5, "train": 5})).label_names == ("bus", "train")


def test_order_of_the_file_system_plays_no_part(tmp_path, monkeypatch):
    write_photos(tmp_path, {"b": 6, "a": 6})
    expected = {name: numbers(part) for name, part in parts_of(load(tmp_path)).items()}
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: Path) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr("host.data.folder.os.scandir", Reversed)
    assert {name: numbers(part) for name, part in parts_of(load(tmp_path)).items()} == expected
    assert {name: numbers(part) for name, part in parts_of(load(tmp_path, seed=1)).items()} != expected


def test_relative_paths_start_at_the_recipe(tmp_path):
    write_photos(tmp_path / "photos", {"cat": 5, "dog": 5})
    splits = load_splits(DataSpec(source="folder:photos"), seed=0, folder=tmp_path)
    assert len(splits.train) == 6


def test_hidden_and_other_files_are_not_looked_at(tmp_path):
    write_photos(tmp_path, {"cat": 5, "dog": 5, ".trash": 5})
    for name in ("._0001.jpg", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / "cat" / name).write_bytes(b"no image")
    (tmp_path / "README.md").write_text("photos")
    assert sum(len(part) for part in parts_of(load(tmp_path)).values()) == 10


@pytest.mark.parametrize("kind", ["JPG", "jpeg", "PNG", "webp", "bmp"])
def test_extensions_count_in_any_case(tmp_path, kind):
    assert len(load(write_photos(tmp_path, {"a": 5, "b": 5}, kind=kind)).test) == 2


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_unreadable_images_are_named_before_training(tmp_path):
    write_photos(tmp_path, {"cat": 20, "dog": 9}, kind="jpg")
    for number in range(12):
        cut_off(tmp_path / "cat" / f"{number:04}.jpg")
    (tmp_path / "dog" / "0020.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"13 of 29 images cannot be decoded: cat/0000.jpg, .*cat/0009.jpg and 3 more; "
    ):
        load(tmp_path)


def test_unreadable_images_can_be_left_out(tmp_path):
    write_photos(tmp_path, {"cat": 10, "dog": 10}, kind="jpg")
    cut_off(tmp_path / "cat" / "0003.jpg")
    (tmp_path / "dog" / "0015.jpg").write_text("a page that says 404")
    splits = load(tmp_path, unreadable="skip")
    assert splits.skipped == ("cat/0003.jpg", "dog/0015.jpg")
    assert sum(len(part) for part in parts_of(splits).values()) == 18
    assert splits.description.endswith("images left out because they cannot be decoded: 2")


def test_checking_tells_how_far_it_is(tmp_path):
    calls: list[tuple[int, int]] = []
    spec = DataSpec(source=f"folder:{write_photos(tmp_path, {'a': 70, 'b': 30})}")
    load_splits(spec, seed=0, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(64, 100), (100, 100)]


def test_an_image_that_vanishes_later_is_named(tmp_path):
    splits = load(write_photos(tmp_path, {"a": 5, "b": 5}))
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"000\d\.png: cannot be decoded .*No such file"):
        splits.train.images[0]


def make_one_class(path: Path) -> None:
    write_photos(path, {"cat": 9})


def make_no_folders(path: Path) -> None:
    write_photos(path.parent, {path.name: 3})


def make_empty_class(path: Path) -> None:
    write_photos(path, {"cat": 9, "dog": 0})


def make_too_few(path: Path) -> None:
    write_photos(path, {"cat": 9, "dog": 2})


def make_nested(path: Path) -> None:
    write_photos(path / "cat", {"monday": 3})
    write_photos(path, {"cat": 3, "dog": 3})


def make_iphone_photos(path: Path) -> None:
    write_photos(path, {"cat": 9, "dog": 9})
    (path / "cat" / "IMG_0001.HEIC").write_bytes(b"heic")


def make_other_classes(path: Path) -> None:
    write_photos(path / "train", {"cat": 9, "dog": 9})
    write_photos(path / "test", {"cat": 9, "eel": 9})


def make_two_validations(path: Path) -> None:
    for part in ("train", "val", "valid"):
        write_photos(path / part, {"cat": 3, "dog": 3})


def make_test_only(path: Path) -> None:
    write_photos(path / "test", {"cat": 3, "dog": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such folder; name a folder that holds one folder per class"),
        (lambda path: path.write_text(""), "is a file; name a folder"),
        (lambda path: path.mkdir(), "holds no folders; add one folder per class"),
        (make_no_folders, "holds no folders; sort its images"),
        (make_one_class, "1 class .cat., but a classifier needs at least 2"),
        (make_empty_class, "class 'dog' has no images .*; add some or remove it"),
        (make_too_few, "class 'dog' has 2 images, too few"),
        (make_nested, "cat: holds the folder 'monday'; images lie directly"),
        (make_iphone_photos, r"1 images of kinds that are not read \(IMG_0001.HEIC\); convert them"),
        (make_other_classes, r"train and test differ in their classes \(only in test: eel\)"),
        (make_two_validations, "both 'val' and 'valid' are validation images; keep one"),
        (make_test_only, "holds 'test' but no 'train'"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path, make, message):
    make(tmp_path / "photos")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "photos")


def encoded(picture: Image.Image, kind: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return io.BytesIO(buffer.getvalue())


def test_photos_are_turned_as_exif_says():
    picture = Image.new("RGB", (4, 2), "black")
    picture.paste("red", (0, 0, 1, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    decoded = decode(encoded(picture, "PNG", exif=exif))
    assert decoded.shape == (4, 2, 3)
    assert decoded[0, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_modes_become_rgb_of_8_bits(mode):
    picture = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    decoded = decode(encoded(picture, "PNG"))
    assert (decoded.dtype, decoded.shape, decoded.min()) == (np.uint8, (2, 3, 3), 255)


def test_cmyk_becomes_rgb():
    decoded = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    np.testing.assert_allclose(decoded[4, 4], [255, 0, 0], atol=12)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_parts_are_white(kind):
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (200, 0, 0, 0))
    assert decode(encoded(picture, kind, lossless=True)).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_transparent_palette_entries_are_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 0, 0, 0, 0, 200])
    picture.putpixel((1, 0), 1)
    assert decode(encoded(picture, "PNG", transparency=b"\xff\x00")).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_16_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    decoded = decode(encoded(Image.fromarray(values), "PNG"))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (decoded == decoded[..., :1]).all()
