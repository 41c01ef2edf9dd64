"""Tar shards as webdataset writes them (`photos-000000.tar`, ...): images and labels of millions, in few files.

A sample is the files of one key: `KEY.jpg` (or .jpeg, .png, .webp) and `KEY.cls`, the class's number or name; numbers
index `classes.txt`, which lies beside the shards, one name per line. Files of other kinds are left alone.

webdataset reads such shards as a stream: workers and processes get whole shards, so an epoch of several processes
repeats or drops images unless shards happen to divide evenly, and a training that was stopped cannot go on where it was.
We read the tars' headers once and then any image by its place (offset and size), so that any sampler reads each image
exactly once, with any number of workers and processes, and resumes exactly. What is lost is sequential reading, which
`LabeledImages.blocks` gives back: a sampler that goes from shard to shard stays in the file system's cache.

Shards whose names begin with train, val (validation, valid) or test, as in `train-000000.tar`, are those splits.
"""

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

import numpy as np

from host.data.folder import PART_OF
from host.data.pictures import NOT_DECODABLE, decode
from host.data.spec import listed, suggestion
from host.data.splits import LabeledImages, Source
from host.errors import DataError

CLASSES_FILE = "classes.txt"
_IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PART = re.compile(r"(?i)(train|validation|valid|val|test)(?![a-z])")


@dataclass(frozen=True, slots=True)
class _Sample:
    key: str
    offset: int
    size: int
    label: str


@dataclass(frozen=True, slots=True)
class ShardImages:
    """Images at their places in tar files. A file is opened for each read: nothing is shared by processes."""

    shards: tuple[Path, ...]
    shard: np.ndarray  # int64 [N], which of the shards
    offset: np.ndarray  # int64 [N], bytes
    size: np.ndarray  # int64 [N], bytes
    keys: np.ndarray  # bytes [N]

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return decode(io.BytesIO(self.encoded(index)))
        except NOT_DECODABLE as error:
            raise DataError(f"{self.name(index)}: cannot be decoded ({error}); write the shard again") from error

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]].name}: {os.fsdecode(self.keys[index])}"

    def encoded(self, index: int) -> bytes:
        with self.shards[self.shard[index]].open("rb") as file:
            file.seek(self.offset[index])
            return file.read(self.size[index])


def read_shards(pattern: str) -> Source:
    """Read the headers of all shards; no image is decoded here.

    Args:
        pattern: a path with braces, `photos-{000000..000015}.tar`, or wildcards, `photos-*.tar`.

    Raises:
        DataError: no such shards, a damaged or compressed one, or a sample without image, without label or with an
            unknown one.
    """
    shards = _find(pattern)
    samples = [list(_scan(shard)) for shard in shards]
    names = _label_names(shards, {sample.label for found in samples for sample in found})
    chosen: dict[str, list[int]] = {}
    for index, shard in enumerate(shards):
        chosen.setdefault(_part_of(shard), []).append(index)
    if "train" not in chosen:
        raise DataError(f"{pattern}: these are shards of {' and '.join(chosen)} only; name those to train on too")
    return Source(
        title=f"shards {'/'.join(Path(pattern).parts[-2:])!r}",
        terms="unknown",
        label_names=names,
        channels=3,
        **{part: _collect(shards, samples, indices, names) for part, indices in chosen.items()},
    )


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as a-08, a-09, a-10, and `{a,b}.tar` as a and b; several pairs of braces multiply."""
    pieces = [
        [f"{n:0{len(numbers[1])}}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
        if (numbers := _RANGE.fullmatch(piece))
        else piece[1:-1].split(",")
        if piece.startswith("{") and "," in piece
        else [piece]
        for piece in re.split(r"(\{[^{}]*\})", pattern)
    ]
    return ["".join(choice) for choice in product(*pieces)]


def _find(pattern: str) -> tuple[Path, ...]:
    found = [
        path
        for name in expand_braces(pattern)
        for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])
    ]
    shards = tuple(Path(name).absolute() for name in dict.fromkeys(found))
    if not shards:
        raise DataError(f"{pattern}: no file matches; write a pattern such as shards:photos-*.tar")
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: no such file, {len(missing)} of {len(shards)} shards are missing; "
            "write a pattern such as shards:photos-{000000..000015}.tar, and only of shards that are there"
        )
    return shards


def _scan(shard: Path) -> Iterator[_Sample]:
    try:
        with tarfile.open(shard, "r:") as archive:
            files = ((match, member) for member in archive if (match := _MEMBER.fullmatch(member.name)))
            for key, group in groupby(files, key=lambda file: file[0][1]):
                yield from _sample(shard, archive, key, [(match[2].lower(), member) for match, member in group])
    except tarfile.ReadError as error:
        raise DataError(
            f"{shard}: not a tar file, or cut off, or compressed ({error}); copy it again, or unpack it with gunzip"
        ) from error


def _sample(
    shard: Path, archive: tarfile.TarFile, key: str, files: Sequence[tuple[str, tarfile.TarInfo]]
) -> Iterator[_Sample]:
    """The sample that the files of one key make; none, if neither an image nor a label is among them."""
    images = [member for kind, member in files if kind in _IMAGE_KINDS]
    labels = [_read_text(archive, member) for kind, member in files if kind == "cls"]
    if not images and not labels:
        return
    if len(images) != 1 or len(labels) != 1 or not labels[0]:
        raise DataError(
            f"{shard}: sample {key!r} has {', '.join(sorted(kind for kind, _ in files))}, but it needs one image "
            f"({', '.join(_IMAGE_KINDS)}) and one label (cls), after one another; write the shard again"
        )
    yield _Sample(key, images[0].offset_data, images[0].size, labels[0])


def _read_text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return file.read().decode("utf-8", "replace").strip() if file else ""


def _label_names(shards: Sequence[Path], labels: set[str]) -> tuple[str, ...]:
    """The classes: of `classes.txt`, else as many as the largest number says, else the labels in alphabetical order."""
    files = sorted({shard.with_name(CLASSES_FILE) for shard in shards})
    lists = {tuple(file.read_text(encoding="utf-8").splitlines()) for file in files if file.is_file()}
    if len(lists) > 1:
        raise DataError(f"{', '.join(map(str, files))} differ; all shards must have the same classes")
    if lists:
        return lists.pop()
    if not all(label.isdecimal() for label in labels):
        return tuple(sorted(labels))
    numbers = sorted(map(int, labels))
    if numbers != list(range(len(numbers))):
        raise DataError(
            f"{shards[0]}: the classes are numbered {listed(list(map(str, numbers)))}; number them from 0 without gaps, "
            f"or list their names in {CLASSES_FILE} beside the shards"
        )
    return tuple(map(str, numbers))


def _collect(
    shards: tuple[Path, ...], samples: Sequence[Sequence[_Sample]], chosen: Sequence[int], names: Sequence[str]
) -> LabeledImages:
    """The samples of the chosen shards."""
    position = {name: label for label, name in enumerate(names)}
    position |= {str(label): label for label in range(len(names))}  # a number counts before a name that looks like one
    found = [(index, sample) for index in chosen for sample in samples[index]]
    for index, sample in found:
        if sample.label not in position:
            raise DataError(
                f"{shards[index]}: sample {sample.key!r} is of class {sample.label!r}{suggestion(sample.label, names)} "
                f"{CLASSES_FILE} holds {len(names)} names; numbers count from 0"
            )
    shard = np.array([index for index, _ in found], np.int64)
    images = ShardImages(
        shards=shards,
        shard=shard,
        offset=np.array([sample.offset for _, sample in found], np.int64),
        size=np.array([sample.size for _, sample in found], np.int64),
        keys=np.array([os.fsencode(sample.key) for _, sample in found]),
    )
    labels = np.array([position[sample.label] for _, sample in found], np.int64)
    return LabeledImages(images=images, labels=labels, blocks=shard)


def _part_of(shard: Path) -> str:
    match = _PART.match(shard.name)
    return PART_OF[match[1].lower()] if match else "train"
