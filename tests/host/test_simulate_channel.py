"""A simulated board follows a real channel, verified once for all boards of a process."""

import shutil
from pathlib import Path

import pytest

from device.contract.errors import ArtifactError, ConfigError, UpdateRefusedError
from host.fleet.repository import UpdateRepository
from host.simulate.channel import Channel
from host.simulate.config import SimulationConfig
from host.simulate.fleet import find_release
from host.simulate.models import Sources
from host.simulate.slots import Slots
from tests.support.bundles import make_manifest, write_plain_bundle


class Keeper:
    """Who publishes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repository = UpdateRepository.open_or_create(directory / "repo", directory / "keys")

    @property
    def path(self) -> Path:
        return self.repository.directory

    def publish(self, release: int, *, boards: tuple[str, ...] = ("generic-x86-64",)) -> None:
        manifest = make_manifest(release=release, version=f"{release}.0.0", boards=boards)
        self.repository.publish(write_plain_bundle(self.directory / f"{release}.fieldvit", manifest), "stable")

    def target(self, name: str) -> Path:
        return next((self.path / "targets").rglob(f"*.{name}"))


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    keeper = Keeper(tmp_path)
    keeper.publish(1)
    return keeper


def test_the_channel_is_followed_and_a_bundle_is_read_once(keeper: Keeper):
    channel = Channel(keeper.path, "stable")
    first = channel.offer()
    assert (first.release, first.version, first.labels, len(first.sha256)) == (1, "1.0.0", ("a", "b"), 64)
    keeper.target("plain-1.0.0.fieldvit").unlink()  # nobody reads it again
    assert channel.offer() is first
    keeper.publish(2)
    assert channel.offer().release == 2


def test_all_boards_of_a_process_share_a_source(keeper: Keeper):
    sources = Sources(keeper.path, "stable")
    assert sources.offer(None) is sources.offer(f"dir:{keeper.path}")
    with pytest.raises(ConfigError, match="reads dir:PATH only"):
        sources.offer("http://updates.local")
    with pytest.raises(UpdateRefusedError, match="start the simulation with --updates DIR"):
        Sources(None, "stable").offer(None)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda keeper: keeper.target("plain-1.0.0.fieldvit").write_bytes(b"x"), "checksum"),
        (lambda keeper: (keeper.path / "metadata" / "1.root.json").write_bytes(b"{}"), "signature"),
        (lambda keeper: (keeper.path / "metadata" / "timestamp.json").unlink(), "unreachable"),
        (lambda keeper: shutil.rmtree(keeper.path), "unreachable"),
    ],
)
def test_a_damaged_repository_is_refused_with_a_boards_reason(keeper: Keeper, damage, reason: str):
    damage(keeper)
    channel = Channel(keeper.path, "stable")
    for _ in range(2):
        with pytest.raises(UpdateRefusedError) as refused:
            channel.offer()
        assert refused.value.reason == reason
    assert str(keeper.path) in str(refused.value)


def test_a_channel_that_is_not_there_is_named(keeper: Keeper):
    with pytest.raises(UpdateRefusedError, match="has no channel 'beta'; 'fieldvit publish --channel beta' makes it"):
        Channel(keeper.path, "beta").offer()


def test_boards_begin_with_what_their_channel_offers(keeper: Keeper):
    config = SimulationConfig(devices=1, updates=keeper.path)
    assert find_release(config).version == "1.0.0"
    assert find_release(SimulationConfig(devices=1)).name == "simulated"
    with pytest.raises(UpdateRefusedError, match="built for generic-x86-64, not for raspberry-pi-5"):
        find_release(SimulationConfig(devices=1, updates=keeper.path, board="raspberry-pi-5"))
    with pytest.raises(ConfigError, match="board 'toaster' is unknown"):
        find_release(SimulationConfig(devices=1, board="toaster"))


def test_a_rejected_bundle_gives_way_to_the_one_before(keeper: Keeper):
    old = Channel(keeper.path, "stable").offer()
    keeper.publish(2)
    new = Channel(keeper.path, "stable").offer()
    slots = Slots(old, "int8")
    with pytest.raises(ArtifactError, match="no earlier confirmed model"):
        slots.other()
    testing = slots.begin_testing(slots.stage(new), "int8")
    assert (slots.table()["state"], slots.table()["release"], testing.slot) == ("testing", 2, "b")
    slots.reject(testing, "budget")
    assert (slots.serving.release, slots.rejection(new.sha256), slots.rejection(old.sha256)) == (old, "budget", "")
