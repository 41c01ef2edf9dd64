"""The update repository: what it publishes a TUF client accepts; what would break a fleet it refuses."""

import stat

import pytest

from host.errors import FleetError
from host.fleet.keys import create_keys
from host.fleet.repository import UpdateRepository, published_digest
from tests.support.bundles import make_manifest, with_content, write_plain_bundle


@pytest.fixture
def repository(tmp_path):
    return UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "keys")


def test_release_moves_forward_only(repository, tmp_path):
    repository.publish(write_plain_bundle(tmp_path / "1.fieldvit"), "stable")
    second = write_plain_bundle(tmp_path / "2.fieldvit", make_manifest(release=2, version="0.2.0"))
    repository.publish(second, "stable")
    assert repository.release_of("stable") == 2
    with pytest.raises(FleetError, match="has release 2, the bundle is release 2"):
        repository.publish(second, "stable")


def test_channels_are_independent(repository, tmp_path):
    bundle = write_plain_bundle(tmp_path / "1.fieldvit")
    repository.publish(bundle, "stable")
    repository.publish(bundle, "canary")
    assert (repository.release_of("stable"), repository.release_of("canary"), repository.release_of("beta")) == (
        1,
        1,
        None,
    )


def test_a_version_keeps_its_content(repository, tmp_path):
    repository.publish(write_plain_bundle(tmp_path / "1.fieldvit"), "stable")
    other = with_content(make_manifest(release=2), b"other bytes")
    with pytest.raises(FleetError, match="already published with other content"):
        repository.publish(write_plain_bundle(tmp_path / "x.fieldvit", other, content=b"other bytes"), "stable")


def test_reopened_with_its_keys_and_not_with_others(repository, tmp_path):
    again = UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "keys")
    assert again.root_bytes == repository.root_bytes
    create_keys(tmp_path / "strangers")
    with pytest.raises(FleetError, match="key given is not this repository's"):
        UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "strangers")


def test_keys_are_private_and_made_whole(repository, tmp_path):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert modes == {0o600}
    assert len(list((tmp_path / "keys").iterdir())) == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".keys-")] == []


def test_missing_key_is_named(repository, tmp_path):
    (tmp_path / "keys" / "snapshot.pem").unlink()
    with pytest.raises(FleetError, match="the snapshot key is missing; pass its own --keys"):
        UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "keys")


def test_interrupted_creation_is_done_again(tmp_path, monkeypatch):
    create_keys(tmp_path / "keys")
    (tmp_path / "updates" / "metadata").mkdir(parents=True)
    (tmp_path / "updates" / "metadata" / "1.root.json").write_text("{}")
    repository = UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "keys")
    assert b'"_type"' in repository.root_bytes


def test_published_digest_needs_no_key(repository, tmp_path):
    bundle = write_plain_bundle(tmp_path / "1.fieldvit")
    repository.publish(bundle, "stable")
    assert published_digest(tmp_path / "updates", "plain-0.1.0.fieldvit")
    assert published_digest(tmp_path / "updates", "plain-9.9.9.fieldvit") is None
    with pytest.raises(FleetError, match="not a whole update repository"):
        published_digest(tmp_path, "plain-0.1.0.fieldvit")


def test_bad_channel_name_is_refused(repository, tmp_path):
    with pytest.raises(FleetError, match=r"channel '\.\./x'"):
        repository.publish(write_plain_bundle(tmp_path / "1.fieldvit"), "../x")
