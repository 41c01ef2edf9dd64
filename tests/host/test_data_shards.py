"""Tar shards: parity with webdataset, every image once over workers and processes, round trips, what is refused."""

import gc
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from host.data.pictures import decode
from host.data.shard_writer import write_shards
from host.data.shards import expand_braces, read_shards
from host.data.sources import load_splits
from host.data.spec import DataSpec
from host.data.splits import LabeledImages, class_counts
from host.errors import DataError
from tests.support.images import numbered_images, numbers, write_photos

NAMES = ("cat", "dog", "eel")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_webdataset(folder: Path, count: int = 30, *, per_shard: int = 8, names: bool = False) -> str:
    """Shards that webdataset's own writer writes; the pattern that finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/photos-%06d.tar", maxcount=per_shard, verbose=0) as writer:
        for number in range(count):
            label = NAMES[number % 3] if names else number % 3
            writer.write({"__key__": f"a/{number:04}", "png": png(number), "cls": label, "json": {"note": number}})
    return f"{folder}/photos-{{000000..{(count - 1) // per_shard:06}}}.tar"


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves a shard to the collector
def test_images_and_labels_are_those_that_webdataset_reads(tmp_path):
    pattern = write_webdataset(tmp_path)
    expected = list(webdataset.WebDataset(pattern, shardshuffle=False))
    gc.collect()
    found = read_shards(pattern).train
    assert len(found) == len(expected) == 30
    for index, sample in enumerate(expected):
        assert found.images.encoded(index) == sample["png"]
        assert found.images.name(index).endswith(f": {sample['__key__']}")
        assert found.labels[index] == int(sample["cls"])
        np.testing.assert_array_equal(found.images[index], decode(io.BytesIO(sample["png"])))
    assert found.blocks.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 6


def test_names_come_from_the_list_beside_the_shards_or_from_the_labels(tmp_path):
    pattern = write_webdataset(tmp_path / "numbers")
    assert read_shards(pattern).label_names == ("0", "1", "2")
    (tmp_path / "numbers" / "classes.txt").write_text("fox\ngnu\nhen\n")
    assert read_shards(pattern).label_names == ("fox", "gnu", "hen")
    by_name = read_shards(write_webdataset(tmp_path / "names", names=True))
    assert by_name.label_names == NAMES
    assert by_name.train.labels.tolist() == [number % 3 for number in range(30)]


def test_splits_keep_their_blocks(tmp_path):
    splits = load_splits(DataSpec(source=f"shards:{write_webdataset(tmp_path)}", held_back=("2",)), seed=0)
    assert class_counts(splits) == [("0", 7, 1, 0, 2), ("1", 7, 1, 0, 2), ("2", 0, 0, 8, 2)]
    for part in (splits.train, splits.validation, splits.field, splits.test):
        assert part.blocks.tolist() == [number // 8 for number in numbers(part)]
    assert str(tmp_path) not in splits.description


def test_shards_called_train_val_and_test_are_those_splits(tmp_path):
    for part, first in (("train", 0), ("val", 10), ("test", 20)):
        files = {}
        for number in range(first, first + 6):
            files |= {f"{number}.png": png(number), f"{number}.cls": b"%d" % (number % 2)}
        write_tar(tmp_path / f"{part}-000.tar", files)
    splits = load_splits(DataSpec(source="shards:*-000.tar"), seed=0, folder=tmp_path)
    assert [sorted(numbers(p)) for p in (splits.train, splits.validation, splits.test)] == [
        list(range(6)),
        list(range(10, 16)),
        list(range(20, 26)),
    ]


class Indexed(Dataset):
    """What a training's data set does: an image by its number."""

    def __init__(self, images: LabeledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> int:
        return int(self.images.images[index][0, 0, 0])


@pytest.mark.parametrize("start", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_processes_of_two_workers_read_every_image_once(tmp_path, start):
    images = read_shards(write_webdataset(tmp_path, count=32)).train
    found = []
    for rank in range(2):
        sampler = DistributedSampler(Indexed(images), num_replicas=2, rank=rank, shuffle=True)
        loader = DataLoader(
            Indexed(images), batch_size=4, sampler=sampler, num_workers=2, multiprocessing_context=start
        )
        own = [number for batch in loader for number in batch.tolist()]
        assert len(own) == 16
        found += own
    assert sorted(found) == list(range(32))


def test_images_travel_to_other_processes_as_places_only(tmp_path):
    images = read_shards(write_webdataset(tmp_path)).train.images
    content = pickle.dumps(images)
    assert len(content) < 3000
    np.testing.assert_array_equal(pickle.loads(content)[29], images[29])


def test_photos_are_copied_byte_for_byte(tmp_path):
    photos = write_photos(tmp_path / "photos", {"cat": 9, "dog": 9}, kind="jpg")
    splits = load_splits(DataSpec(source=f"folder:{photos}"), seed=0)
    shards = write_shards(splits.train, splits.label_names, tmp_path / "shards", images_per_shard=5)
    assert [shard.name for shard in shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    source = read_shards(str(tmp_path / "shards" / "*.tar"))
    assert source.label_names == ("cat", "dog")
    assert source.train.labels.tolist() == splits.train.labels.tolist()
    originals = {file.read_bytes() for file in photos.rglob("*.jpg")}
    assert {source.train.images.encoded(index) for index in range(len(source.train))} <= originals
    for index in range(len(source.train)):
        np.testing.assert_array_equal(source.train.images[index], splits.train.images[index])


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_become_png_and_equal_images_equal_bytes(tmp_path, channels):
    images = LabeledImages(images=numbered_images(7)[..., :channels], labels=np.arange(7) % 2)
    (first,), (second,) = (write_shards(images, ("a", "b"), tmp_path / name) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    found = read_shards(str(first)).train
    for index in range(7):
        np.testing.assert_array_equal(found.images[index], np.broadcast_to(images.images[index], (2, 2, 3)))


def test_splits_are_written_to_folders_of_their_own(tmp_path):
    images = LabeledImages(images=numbered_images(8), labels=np.arange(8) % 2)
    for part in ("train", "test"):
        write_shards(images, ("a", "b"), tmp_path / part, part=part)
    source = read_shards(f"{tmp_path}/{{train,test}}/*.tar")
    assert (len(source.train), len(source.test), source.validation) == (8, 8, None)
    (tmp_path / "test" / "classes.txt").write_text("b\na\n")
    with pytest.raises(DataError, match=r"test/classes.txt, .*train/classes.txt differ; all shards must have the same"):
        read_shards(f"{tmp_path}/{{train,test}}/*.tar")


def test_bmp_becomes_png(tmp_path):
    photos = write_photos(tmp_path / "photos", {"cat": 4, "dog": 4}, kind="bmp")
    splits = load_splits(DataSpec(source=f"folder:{photos}"), seed=0)
    write_shards(splits.train, splits.label_names, tmp_path / "shards")
    assert numbers(read_shards(f"{tmp_path}/shards/*.tar").train) == numbers(splits.train)


def test_writing_that_fails_leaves_nothing(tmp_path):
    images = LabeledImages(images=[numbered_images(1)[0], None], labels=np.array([0, 1]))
    with pytest.raises(AttributeError):
        write_shards(images, ("a", "b"), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_writing_over_a_folder_is_refused(tmp_path):
    images = LabeledImages(images=numbered_images(2), labels=np.array([0, 1]))
    with pytest.raises(DataError, match="there is such a folder already; name a new one"):
        write_shards(images, ("a", "b"), tmp_path)


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
        ("{odd}.tar", ["{odd}.tar"]),
    ],
)
def test_braces_expand(pattern, expanded):
    assert expand_braces(pattern) == expanded


@given(st.integers(0, 200), st.integers(0, 30), st.integers(1, 6))
def test_ranges_of_braces_are_as_long_as_they_say(first, more, width):
    expanded = expand_braces(f"{{{first:0{width}}..{first + more}}}")
    assert [int(name) for name in expanded] == list(range(first, first + more + 1))
    assert min(map(len, expanded)) >= width


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    files = {}
    for number in range(12):
        files |= {f"{number:02}.png": png(number), f"{number:02}.cls": b"%d" % (number % 2)}
    pattern = write_tar(tmp_path / "a.tar", files | {"03.png": b"no image"})
    with pytest.raises(DataError, match=r"1 of 12 images cannot be decoded: a.tar: 03; "):
        load_splits(DataSpec(source=f"shards:{pattern}"), seed=0)
    assert load_splits(DataSpec(source=f"shards:{pattern}", unreadable="skip"), seed=0).skipped == ("a.tar: 03",)


def test_files_that_are_no_samples_are_left_alone(tmp_path):
    files = {
        "._0.jpg": b"x",
        "README": b"x",
        "__index__.json": b"{}",
        "0.png": png(0),
        "0.CLS": b"0\n",
        "0.seg.png": b"x",
    }
    source = read_shards(write_tar(tmp_path / "a.tar", files))
    assert (len(source.train), source.train.labels.tolist()) == (1, [0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b""}, "sample '0' has png, but it needs one image"),
        ({"0.cls": b"1"}, "sample '0' has cls, but it needs one image"),
        ({"0.png": b"", "0.jpg": b"", "0.cls": b"1"}, "has cls, jpg, png, but"),
        ({"0.png": b"", "0.cls": b" "}, "sample '0' has cls, png, but it needs one image .* and one label"),
        ({"0.png": b"", "1.cls": b"1", "0.cls": b"1"}, "after one another"),
    ],
)
def test_samples_that_are_not_whole_are_refused(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read_shards(write_tar(tmp_path / "a.tar", files))


def test_numbers_with_gaps_need_names(tmp_path):
    pattern = write_tar(tmp_path / "a.tar", {"0.png": b"", "0.cls": b"1", "1.png": b"", "1.cls": b"1999999999"})
    with pytest.raises(DataError, match="classes are numbered 1, 1999999999; number them from 0 without gaps, or list"):
        read_shards(pattern)


def test_labels_that_are_not_listed_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    pattern = write_tar(tmp_path / "a.tar", {"0.png": b"", "0.cls": b"cot"})
    with pytest.raises(
        DataError, match=r"sample '0' is of class 'cot'; did you mean 'cat'\? classes.txt holds 2 names"
    ):
        read_shards(pattern)


def test_shards_that_cannot_be_read_are_refused(tmp_path):
    pattern = write_webdataset(tmp_path)
    shard = tmp_path / "photos-000001.tar"
    for content in (b"", shard.read_bytes()[:700], b"\x1f\x8b" + bytes(2000)):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"photos-000001.tar: not a tar file, or cut off, or compressed"):
            read_shards(pattern)
    shard.unlink()
    with pytest.raises(DataError, match=r"photos-000001.tar: no such file, 1 of 4 shards are missing"):
        read_shards(pattern)
    with pytest.raises(DataError, match="no file matches; write a pattern"):
        read_shards(f"{tmp_path}/nothing-*.tar")


def test_shards_to_test_only_are_refused(tmp_path):
    pattern = write_tar(tmp_path / "test-0.tar", {"0.png": b"", "0.cls": b"0"})
    with pytest.raises(DataError, match="shards of test only; name those to train on too"):
        read_shards(pattern)
