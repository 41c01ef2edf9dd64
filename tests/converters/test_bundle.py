"""Bundles: the same files give the same bytes, and the backbone's identity follows the backbone alone."""

import hashlib
import os
import stat
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import flatbuffer, tflite
from converters.bundle import backbone_hash, describe, expand, write_bundle
from converters.errors import ConversionError
from device.contract.errors import ArtifactError
from tests.converters.tiny import INPUT_SHAPE, INPUT_SPEC, make_model

NAMES = st.from_regex(r"[a-z]{1,5}(/[a-z]{1,5})?", fullmatch=True)


def test_zip_is_stored_sorted_and_timeless(tmp_path):
    digest = write_bundle({"b.txt": b"two", "a.txt": b"one"}, tmp_path / "x.fieldvit")
    assert digest == hashlib.sha256((tmp_path / "x.fieldvit").read_bytes()).hexdigest()
    with zipfile.ZipFile(tmp_path / "x.fieldvit") as archive:
        infos = archive.infolist()
        assert [info.filename for info in infos] == ["a.txt", "b.txt"]
        assert {
            (info.compress_type, info.date_time, info.external_attr >> 16, info.create_system) for info in infos
        } == {(zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 0o100644, 3)}
        assert archive.read("b.txt") == b"two"


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=50), max_size=4))
def test_order_of_entries_does_not_matter(tmp_path_factory, files):
    directory = tmp_path_factory.mktemp("bundle")
    backwards = dict(reversed(list(files.items())))
    assert write_bundle(files, directory / "a") == write_bundle(backwards, directory / "b")
    with zipfile.ZipFile(directory / "a") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files


def test_times_and_modes_of_the_source_do_not_matter(tmp_path):
    source = tmp_path / "head.npz"
    source.write_bytes(b"weights")
    first = write_bundle({"head.npz": source}, tmp_path / "a")
    os.utime(source, (0, 0))
    source.chmod(0o600)
    assert (
        write_bundle({"head.npz": source}, tmp_path / "b")
        == first
        == write_bundle({"head.npz": b"weights"}, tmp_path / "c")
    )


def test_directories_bring_their_files(tmp_path):
    package = tmp_path / "m.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data" / "weight.bin").write_bytes(b"w")
    (package / "Manifest.json").write_bytes(b"{}")
    assert expand({"model.mlpackage": package}) == {
        "model.mlpackage/Data/weight.bin": b"w",
        "model.mlpackage/Manifest.json": b"{}",
    }


def test_bundle_replaces_an_older_one_whole(tmp_path):
    out = tmp_path / "x.fieldvit"
    write_bundle({"a": b"old"}, out)
    write_bundle({"a": b"new"}, out)
    assert sorted(tmp_path.iterdir()) == [out]
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


def test_failure_leaves_the_older_one(tmp_path):
    out = tmp_path / "x.fieldvit"
    digest = write_bundle({"a": b"old"}, out)
    with pytest.raises(ConversionError, match=r"bundle: a cannot be read from .*nowhere.*export it first"):
        write_bundle({"a": tmp_path / "nowhere"}, out)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a\\b"])
def test_unsafe_names_are_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match="unsafe path"):
        write_bundle({name: b""}, tmp_path / "x")


def test_two_entries_of_one_name_are_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"")
    with pytest.raises(ConversionError, match="two entries are named 'd/f'"):
        expand({"d": tmp_path / "d", "d/f": b""})


def test_description_matches_the_content():
    entry = describe({"a": b"abc"})["a"]
    assert (entry.bytes, entry.sha256) == (3, hashlib.sha256(b"abc").hexdigest())


def test_backbone_hash_ignores_labels_and_head(artifacts, tmp_path):
    original = backbone_hash(artifacts["static"], INPUT_SPEC)
    renamed = flatbuffer.read_model(artifacts["static"])
    flatbuffer.add_metadata(renamed, {"fieldvit.labels": ["x", "y"]})
    for tensor in renamed.subgraphs[0].tensors:
        tensor.name = b"renamed"
    renamed.subgraphs.pop()
    renamed.signatureDefs.pop()
    flatbuffer.write_model(renamed, tmp_path / "renamed.tflite")
    assert backbone_hash(tmp_path / "renamed.tflite", dict(reversed(INPUT_SPEC.items()))) == original


@pytest.mark.slow  # one more conversion
def test_backbone_hash_ignores_the_number_of_classes(artifacts, model, tmp_path):
    other = tflite.convert_float(model, INPUT_SHAPE, 3, tmp_path / "k3.tflite")
    assert backbone_hash(other, INPUT_SPEC) == backbone_hash(artifacts["float32"], INPUT_SPEC)


def test_backbone_hash_follows_preprocessing_precision_and_every_weight(artifacts, tmp_path):
    hashes = {backbone_hash(artifacts[name], INPUT_SPEC) for name in artifacts}
    hashes.add(backbone_hash(artifacts["float32"], {**INPUT_SPEC, "mean": [0.4]}))
    model = flatbuffer.read_model(artifacts["float32"])
    largest = max(
        (tensor.buffer for tensor in model.subgraphs[0].tensors), key=lambda index: _size(model.buffers[index])
    )
    changed = model.buffers[largest].data.copy()
    changed[-1] ^= 1
    model.buffers[largest].data = changed
    flatbuffer.write_model(model, tmp_path / "flipped.tflite")
    hashes.add(backbone_hash(tmp_path / "flipped.tflite", INPUT_SPEC))
    assert len(hashes) == len(artifacts) + 2


def test_backbone_hash_follows_scales(artifacts, tmp_path):
    model = flatbuffer.read_model(artifacts["static"])
    tensor = next(
        item for item in model.subgraphs[0].tensors if item.quantization and item.quantization.scale is not None
    )
    tensor.quantization.scale = np.asarray(tensor.quantization.scale, np.float32) * np.float32(2)
    flatbuffer.write_model(model, tmp_path / "scaled.tflite")
    assert backbone_hash(tmp_path / "scaled.tflite", INPUT_SPEC) != backbone_hash(artifacts["static"], INPUT_SPEC)


def _size(buffer) -> int:
    return 0 if buffer.data is None else len(buffer.data)


def test_the_tiny_model_itself_is_reproducible():
    first, second = make_model().state_dict(), make_model().state_dict()
    assert all((first[name] == second[name]).all() for name in first)
