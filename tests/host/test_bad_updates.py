"""The attacks of the quickstart are what they say: each breaks one thing, and only that."""

import zipfile

import numpy as np
import pytest

from device.contract.bundle import extract, read_manifest
from device.contract.errors import ArtifactError
from host.fleet.repository import UpdateRepository, published_digest
from host.quickstart.bad_updates import damaged_on_the_way, rebuild, wrongly_signed
from tests.support.bundles import write_plain_bundle


@pytest.fixture
def bundle(tmp_path):
    return write_plain_bundle(tmp_path / "plain-0.1.0.fieldvit")


def test_the_stranger_has_other_keys_and_a_newer_release(bundle, tmp_path):
    ours = UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "keys")
    theirs = wrongly_signed(bundle, tmp_path, "stable")
    assert (theirs / "metadata" / "1.root.json").read_bytes() != ours.root_bytes
    assert published_digest(theirs, "plain-0.1.1.fieldvit")


def test_one_byte_differs_on_the_way(bundle, tmp_path):
    repository = UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "keys")
    repository.publish(bundle, "stable")
    name = bundle.name
    copy = damaged_on_the_way(repository.directory, name, tmp_path)
    digest = published_digest(copy, name)
    damaged = np.frombuffer((copy / "targets" / f"{digest}.{name}").read_bytes(), np.uint8)
    assert np.count_nonzero(damaged != np.frombuffer(bundle.read_bytes(), np.uint8)) == 1


def test_a_rebuilt_bundle_is_sound_and_newer(bundle, tmp_path):
    newer = rebuild(bundle, tmp_path / "next", damage_model=False)
    assert read_manifest(newer).release == 2
    extract(newer, tmp_path / "out")
    with zipfile.ZipFile(newer) as archive:
        assert archive.testzip() is None


def test_rebuilding_refuses_what_is_no_bundle(tmp_path):
    (tmp_path / "x.fieldvit").write_bytes(b"no zip")
    with pytest.raises(ArtifactError):
        rebuild(tmp_path / "x.fieldvit", tmp_path / "next", damage_model=False)
