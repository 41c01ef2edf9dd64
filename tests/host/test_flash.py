"""Flashing a directory: what the board will read is there, and a wrong board, bundle or repository is refused."""

import tomllib
from dataclasses import replace

import pytest

from device.contract.errors import ArtifactError, BoardMismatchError, ConfigError
from device.contract.topics import DeviceId
from host.errors import FleetError
from host.fleet.flash import BoardSettings, BrokerSettings, flash_directory
from host.fleet.repository import UpdateRepository
from tests.support.bundles import make_manifest, write_plain_bundle

SETTINGS = BoardSettings(
    id=DeviceId("home", "cam-1"), board="generic-x86-64", broker=BrokerSettings(hostname="127.0.0.1", username="cam")
)


@pytest.fixture
def published(tmp_path):
    bundle = write_plain_bundle(tmp_path / "plain-0.1.0.fieldvit")
    repository = UpdateRepository.open_or_create(tmp_path / "updates", tmp_path / "keys")
    repository.publish(bundle, "stable")
    return bundle, repository.directory


def test_board_gets_root_configuration_and_updates(published, tmp_path):
    bundle, repository = published
    flash_directory(bundle, tmp_path / "board", repository=repository, settings=SETTINGS)
    config = tomllib.loads((tmp_path / "board" / "agent.toml").read_text())
    assert (config["device"], config["broker"]) == ("cam-1", {"hostname": "127.0.0.1", "port": 1883, "username": "cam"})
    assert (tmp_path / "board" / "root.json").read_bytes() == (repository / "metadata" / "1.root.json").read_bytes()
    assert (tmp_path / "board" / "updates" / "metadata" / "timestamp.json").exists()


def test_second_flash_keeps_the_configuration(published, tmp_path):
    bundle, repository = published
    flash_directory(bundle, tmp_path / "board", repository=repository, settings=SETTINGS)
    edited = (tmp_path / "board" / "agent.toml").read_text() + "\n[runtime]\nthreads = 2\n"
    edited = edited.replace('path = "frames"', 'kind = "video"\npath = "clip.mp4"')
    assert "clip.mp4" in edited
    (tmp_path / "board" / "agent.toml").write_text(edited)
    flash_directory(bundle, tmp_path / "board", repository=repository, settings=SETTINGS)
    assert (tmp_path / "board" / "agent.toml").read_text() == edited


@pytest.mark.parametrize("other", [{"id": DeviceId("home", "cam-2")}, {"channel": "canary"}])
def test_another_boards_directory_is_refused(published, tmp_path, other):
    bundle, repository = published
    UpdateRepository.open_or_create(repository, tmp_path / "keys").publish(bundle, "canary")
    flash_directory(bundle, tmp_path / "board", repository=repository, settings=SETTINGS)
    before = sorted(tmp_path.glob("board/**/*"))
    with pytest.raises(FleetError, match=r"agent\.toml: says"):
        flash_directory(bundle, tmp_path / "board", repository=repository, settings=replace(SETTINGS, **other))
    assert sorted(tmp_path.glob("board/**/*")) == before


def test_only_the_channels_files_are_copied(published, tmp_path):
    bundle, repository = published
    newer = write_plain_bundle(tmp_path / "plain-0.2.0.fieldvit", make_manifest(version="0.2.0", release=2))
    UpdateRepository.open_or_create(repository, tmp_path / "keys").publish(newer, "stable")
    flash_directory(newer, tmp_path / "board", repository=repository, settings=SETTINGS)
    bundles = [path.name for path in (tmp_path / "board" / "updates").rglob("*.fieldvit")]
    assert len(bundles) == 1
    assert bundles[0].endswith("plain-0.2.0.fieldvit")
    with pytest.raises(FleetError, match=r"offers plain-0\.2\.0\.fieldvit"):
        flash_directory(bundle, tmp_path / "other", repository=repository, settings=SETTINGS)


def test_a_channel_that_does_not_exist_is_named(published, tmp_path):
    bundle, repository = published
    with pytest.raises(FleetError, match=r"channel beta in .* does not exist"):
        flash_directory(bundle, tmp_path / "b", repository=repository, settings=replace(SETTINGS, channel="beta"))


@pytest.mark.parametrize(("name", "option"), [("board", "--to: "), ("board/frames", "--frames: ")])
def test_a_file_where_a_directory_should_be_is_named_before_anything_is_written(published, tmp_path, name, option):
    bundle, repository = published
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file")
    with pytest.raises(FleetError, match=f"{option}.*{name} is a file; name a directory"):
        flash_directory(bundle, tmp_path / "board", repository=repository, settings=SETTINGS)
    assert not list(tmp_path.glob("board/*.toml"))


def test_other_repository_is_refused(published, tmp_path):
    bundle, repository = published
    flash_directory(bundle, tmp_path / "board", repository=repository, settings=SETTINGS)
    other = UpdateRepository.open_or_create(tmp_path / "updates2", tmp_path / "keys2")
    other.publish(bundle, "stable")
    with pytest.raises(FleetError, match="trusts another repository"):
        flash_directory(bundle, tmp_path / "board", repository=other.directory, settings=SETTINGS)


def test_unpublished_bundle_is_refused(published, tmp_path):
    _, repository = published
    other = write_plain_bundle(tmp_path / "x.fieldvit", make_manifest(version="0.3.0", release=3))
    with pytest.raises(FleetError, match=r"not this plain-0\.3\.0"):
        flash_directory(other, tmp_path / "board", repository=repository, settings=SETTINGS)


@pytest.mark.parametrize(("board", "error"), [("raspberry-pi-5", BoardMismatchError), ("toaster", ConfigError)])
def test_wrong_board_is_refused(published, tmp_path, board, error):
    bundle, repository = published
    settings = BoardSettings(id=SETTINGS.id, board=board)
    with pytest.raises(error):
        flash_directory(bundle, tmp_path / "board", repository=repository, settings=settings)
    assert not (tmp_path / "board").exists()


def test_missing_bundle_is_named(published, tmp_path):
    with pytest.raises(ArtifactError, match="no such bundle"):
        flash_directory(tmp_path / "no.fieldvit", tmp_path / "board", repository=published[1], settings=SETTINGS)
