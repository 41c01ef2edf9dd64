"""A bundle that is not exactly what its manifest says is refused, whatever is wrong with it."""

import io
import random
import zipfile
from pathlib import Path

import pytest

from device.contract.bundle import extract, read_manifest, verify_directory
from device.contract.errors import ArtifactError, ChecksumError
from tests.support.bundles import CONTENT, make_manifest, write_plain_bundle
from tests.support.tiny_bundle import write_zip

MODEL = "model.int8.tflite"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_plain_bundle(tmp_path / "good.fieldvit")


def test_extracting_gives_the_files_and_the_manifest(bundle: Path, tmp_path: Path):
    manifest = extract(bundle, tmp_path / "out")
    assert (tmp_path / "out" / MODEL).read_bytes() == CONTENT
    assert verify_directory(tmp_path / "out") == manifest == read_manifest(bundle) == read_manifest(tmp_path / "out")


def test_every_flipped_bit_is_refused_or_harmless(bundle: Path, tmp_path: Path):
    content, rng = bundle.read_bytes(), random.Random(0)
    damaged, refused = tmp_path / "damaged.fieldvit", 0
    positions = [(byte, 1 << rng.randrange(8)) for byte in range(len(content))]
    for number, (byte, bit) in enumerate(positions):
        damaged.write_bytes(content[:byte] + bytes([content[byte] ^ bit]) + content[byte + 1 :])
        try:
            extract(damaged, tmp_path / "out")
        except ArtifactError:
            refused += 1
        else:  # a bit that says nothing about the content, such as a file's time in the zip
            assert verify_directory(tmp_path / "out") == make_manifest(), number
            assert (tmp_path / "out" / MODEL).read_bytes() == CONTENT
    assert refused > 0.7 * len(positions)


def test_every_truncation_is_refused(bundle: Path, tmp_path: Path):
    content, cut = bundle.read_bytes(), tmp_path / "cut.fieldvit"
    for size in range(0, len(content) - 1, 7):
        cut.write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            extract(cut, tmp_path / "out")


def test_a_file_that_is_no_bundle_is_refused_by_name(tmp_path: Path):
    (tmp_path / "my.toml").write_text('name = "a recipe, and no bundle"')
    with pytest.raises(ArtifactError, match=r"my\.toml: not a bundle, or cut off .*; name a NAME-VERSION\.fieldvit"):
        read_manifest(tmp_path / "my.toml")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "a\\..\\evil"])
def test_paths_that_leave_the_slot_are_refused(tmp_path: Path, name: str):
    table = make_manifest().to_json().replace(f'"{MODEL}": {{', f'"{name.replace(chr(92), chr(92) * 2)}": {{', 1)
    write_zip(tmp_path / "evil.fieldvit", {"manifest.json": table.encode(), MODEL: CONTENT, name: CONTENT})
    with pytest.raises(ArtifactError):
        extract(tmp_path / "evil.fieldvit", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil"))


def test_extra_missing_and_repeated_files_are_refused(tmp_path: Path):
    manifest = make_manifest().to_json().encode()
    variants = {
        "extra": {"manifest.json": manifest, MODEL: CONTENT, "install.sh": b"rm -rf /"},
        "missing": {"manifest.json": manifest},
        "no-manifest": {MODEL: CONTENT},
    }
    for name, members in variants.items():
        write_zip(tmp_path / name, members)
        with pytest.raises(ArtifactError):
            extract(tmp_path / name, tmp_path / "out")


def test_other_content_is_a_checksum_error_that_names_the_file(tmp_path: Path):
    path = write_plain_bundle(tmp_path / "b.fieldvit", content=CONTENT[::-1])
    with pytest.raises(ChecksumError, match=MODEL):
        extract(path, tmp_path / "out")


def test_compressed_members_are_refused(tmp_path: Path):
    """A zip bomb would be one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", make_manifest().to_json())
        archive.writestr(MODEL, CONTENT)
    (tmp_path / "b.fieldvit").write_bytes(buffer.getvalue())
    with pytest.raises(ArtifactError, match="compressed"):
        extract(tmp_path / "b.fieldvit", tmp_path / "out")


def test_an_extracted_bundle_is_checked_again(bundle: Path, tmp_path: Path):
    extract(bundle, tmp_path / "out")
    (tmp_path / "out" / MODEL).write_bytes(CONTENT[:-1])
    with pytest.raises(ChecksumError):
        verify_directory(tmp_path / "out")
    (tmp_path / "out" / MODEL).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        verify_directory(tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 3', "schema 3 is not 1 or 2"),
        ('"release": 1', '"release": 0', "release must be 1 or more"),
        ('"task"', '"tusk"', "unknown key 'tusk'"),
        ('"version": "0.1.0"', '"version": "new"', "must be like 1.2.3"),
        ('"interpolation": "bilinear"', '"interpolation": "bicubic"', "bilinear"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str):
    table = make_manifest().to_json()
    assert old in table
    write_zip(tmp_path / "b.fieldvit", {"manifest.json": table.replace(old, new).encode(), MODEL: CONTENT})
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path / "b.fieldvit")
