"""Damaged bundles: what the mutations do, and, at a twentieth of the scale, what the board does with them."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bench.damage import BEFORE_SIGNING, GOLDEN, HEAD, LABELS, MODELS, ON_THE_WAY, Sound, pack
from bench.damaged_bundles import BEFORE, COUNTS, list_jobs, measure
from device.contract.bundle import extract
from device.contract.errors import ArtifactError
from tests.support.tiny_bundle import make_manifest

FILES = {
    **dict.fromkeys(MODELS, bytes(range(256)) * 4),
    HEAD: pack({"a.npy": b"\x93NUMPY"}),
    GOLDEN: b"golden" * 50,
    LABELS: b"labels",
}
SOUND = Sound(
    bundle=pack({"manifest.json": make_manifest(FILES, release=2).to_json().encode(), **FILES}),
    files=FILES,
    other=pack({"manifest.json": make_manifest(FILES, release=1).to_json().encode(), **FILES}),
)
OF_ANY_FILE = ["any bytes of the bundle", "unsafe path", "link or device", "duplicate name", "headers disagree"]
OF_ANY_FILE += [
    "bytes of no file",
    "manifest value",
    "manifest key",
    "manifest text",
    "input record",
    "labels",
    "swapped files",
]


def test_there_are_enough_and_half_of_them_are_signed():
    jobs = list_jobs()
    counts = {when: sum(job.settings["count"] for job in jobs if job.key["damaged"] == when) for when in COUNTS}
    assert sum(counts.values()) >= 5000
    assert counts[BEFORE] * 2 >= sum(counts.values())
    assert len(jobs) == len(ON_THE_WAY) + len(BEFORE_SIGNING) == len({job.label for job in jobs})


@pytest.mark.parametrize("name", [*ON_THE_WAY, *OF_ANY_FILE])
def test_a_mutation_is_repeatable_and_changes_something(name: str):
    mutation = {**ON_THE_WAY, **BEFORE_SIGNING}[name]
    results = [[mutation(SOUND, np.random.default_rng([seed, 1])) for seed in range(20)] for _ in range(2)]
    assert results[0] == results[1]
    assert sum(result != SOUND.bundle for result in results[0]) >= 18
    assert len(set(results[0])) > 1 or name == "another signed bundle"


@pytest.mark.parametrize("name", ["swapped files", "labels", "input record"])
def test_what_is_signed_for_has_right_hashes(tmp_path: Path, name: str):
    """What only the self-test can tell must not be refused for a trifle."""
    for seed in range(20):
        path = tmp_path / "b.fieldvit"
        path.write_bytes(BEFORE_SIGNING[name](SOUND, np.random.default_rng(seed)))
        with zipfile.ZipFile(path) as archive:
            table = json.loads(archive.read("manifest.json"))
            for member, entry in table["files"].items():
                assert hashlib.sha256(archive.read(member)).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("name", ["unsafe path", "link or device", "duplicate name", "bytes of no file"])
def test_every_trick_with_the_zip_is_refused(tmp_path: Path, name: str):
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    for seed in range(80):
        (place / "b.fieldvit").write_bytes(BEFORE_SIGNING[name](SOUND, np.random.default_rng([seed, 2])))
        with pytest.raises(ArtifactError):
            extract(place / "b.fieldvit", place / "out")
        assert not (place / "out").exists(), "something was written before all of it was checked"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b.fieldvit"]


def test_headers_that_disagree_are_refused_or_say_nothing_of_the_files(tmp_path: Path):
    path, refused = tmp_path / "b.fieldvit", 0
    for seed in range(150):
        path.write_bytes(BEFORE_SIGNING["headers disagree"](SOUND, np.random.default_rng(seed)))
        try:
            manifest = extract(path, tmp_path / "out")
        except ArtifactError:
            refused += 1
        else:  # a time, or the system that a member was made on
            assert manifest == make_manifest(FILES, release=2)
            assert all((tmp_path / "out" / file).read_bytes() == content for file, content in FILES.items())
    assert refused > 100


def test_the_sound_bundle_is_sound(tmp_path: Path):
    (tmp_path / "b.fieldvit").write_bytes(SOUND.bundle)
    assert extract(tmp_path / "b.fieldvit", tmp_path / "out").release == 2


@pytest.mark.slow
def test_no_damaged_bundle_serves_wrongly_or_harms_the_agent():
    for job in list_jobs(scale=20):
        row = measure(job)
        assert (row["outside"], row["crashes"]) == (0, 0), (job.label, row)
        assert row["tried"] == row["refused"] + row["loaded"]
        if job.key["damaged"] != BEFORE:
            assert row["loaded"] == 0, (job.label, row)
