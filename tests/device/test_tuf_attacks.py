"""The attacks that The Update Framework names, against a board that serves a model: each is refused with its own reason.

Each runs from a directory and from a web server. The attacker owns the place where updates come from, and in some cases
also keys; what was served before is served after, and an honest repository is believed again.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, TargetFile

from device.config import load_config
from device.contract.board import load_board
from device.contract.errors import UpdateRefusedError
from device.selftest import SelfTest
from device.slots import Slots
from device.trusted_time import TrustedTime
from device.updater import Updater
from device.web import WebFetch
from host.cli import main
from host.fleet.keys import by_id, load_keys
from host.fleet.metadata import newest_root, read_current
from host.fleet.repository import UpdateRepository, target_path
from tests.support.agent import Field
from tests.support.tiny_bundle import bundle_files, make_manifest, write_zip
from tests.support.web import Site, serve

BOARD = load_board("generic-x86-64")
PASSED = SelfTest(
    precision="", golden_difference=0, load_s=0, latency_p50_ms=1, latency_p90_ms=1, latency_p99_ms=1, peak_memory_mb=1
)


@dataclass
class Attacker:
    """Owns a copy of the repository, and the server in front of it."""

    field: Field
    directory: Path
    site: Site | None = None
    clock: Callable[[], float] = time.time

    @property
    def metadata(self) -> Path:
        return self.directory / "metadata"

    def keys(self, name: str = "keys") -> dict[str, CryptoSigner]:
        return by_id(load_keys([self.field.directory / name]))

    def latest(self, role: str) -> Metadata[Any]:
        current = read_current(self.directory)
        version = current.role(role).version
        name = "timestamp.json" if role == "timestamp" else f"{version}.{role}.json"
        return Metadata.from_file(str(self.metadata / name))

    def resign(self, role: str, change: Callable[[Any], None], *, version: int = 1) -> bytes:
        """Change the newest metadata of a role and sign it with the real key; returns what was written."""
        metadata = self.latest(role)
        metadata.signed.version += version
        change(metadata.signed)
        metadata.signatures.clear()
        keys, root = self.keys(), newest_root(self.directory)
        for keyid in root.roles[role].keyids:
            metadata.sign(keys[keyid], append=True)
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        (self.metadata / name).write_bytes(metadata.to_bytes())
        return metadata.to_bytes()

    def resign_targets(self, change: Callable[[Any], None]) -> None:
        """The same for targets, with the snapshot and timestamp that belong to them."""
        targets = self.resign("targets", change)
        version = Metadata.from_bytes(targets).signed.version
        meta = {"targets.json": MetaFile.from_data(version, targets, ["sha256"])}
        snapshot = self.resign("snapshot", lambda signed: setattr(signed, "meta", meta))
        self.point_at(snapshot)

    def point_at(self, snapshot: bytes) -> None:
        meta = MetaFile.from_data(Metadata.from_bytes(snapshot).signed.version, snapshot, ["sha256"])
        self.resign("timestamp", lambda signed: setattr(signed, "snapshot_meta", meta))

    def publish(self, release: int, **changes: Any) -> Path:
        """Publish with the real keys into the attacker's copy."""
        self.field.repository, real = UpdateRepository(self.directory, self.keys()), self.field.repository
        try:
            return self.field.publish(release, **changes)
        finally:
            self.field.repository = real

    def cli(self, *arguments: str) -> None:
        places = ["--repo", str(self.directory), "--keys", str(self.field.directory / "keys")]
        assert main(["publish", *arguments, *places]) == 0


def wrong_keys(attacker: Attacker) -> None:
    shutil.rmtree(attacker.directory)
    foreign = UpdateRepository.open_or_create(attacker.directory, attacker.field.directory / "foreign")
    attacker.field.repository, real = foreign, attacker.field.repository
    attacker.field.publish(3)
    attacker.field.repository = real


def timestamp_rollback(attacker: Attacker) -> None:
    attacker.field.publish(2, licence="MIT")
    look(attacker.field, attacker.field.directory / "repo", passing=True)  # the board sees something newer


def snapshot_rollback(attacker: Attacker) -> None:
    """The timestamp key is stolen: it points back at an old snapshot, with a new version of its own."""
    timestamp_rollback(attacker)
    shutil.copytree(attacker.field.directory / "repo", attacker.directory, dirs_exist_ok=True)
    attacker.point_at((attacker.metadata / "2.snapshot.json").read_bytes())


def targets_rollback(attacker: Attacker) -> None:
    """The timestamp's and the snapshot's keys are stolen: they point back at old targets."""
    timestamp_rollback(attacker)
    shutil.copytree(attacker.field.directory / "repo", attacker.directory, dirs_exist_ok=True)
    old = MetaFile.from_data(2, (attacker.metadata / "2.targets.json").read_bytes(), ["sha256"])
    attacker.point_at(attacker.resign("snapshot", lambda signed: setattr(signed, "meta", {"targets.json": old})))


def root_rollback(attacker: Attacker) -> None:
    shutil.copy(attacker.metadata / "1.root.json", attacker.metadata / "2.root.json")


def freeze(attacker: Attacker) -> None:
    attacker.clock = lambda: time.time() + 31 * 86400


def freeze_with_the_clock_set_back(attacker: Attacker) -> None:
    """The board has noticed; now somebody sets its clock back."""
    later = Attacker(attacker.field, attacker.directory, clock=lambda: time.time() + 31 * 86400)
    assert refusal(later, attacker.directory) == "expired"


def mixed_snapshot(attacker: Attacker) -> None:
    attacker.publish(2)
    shutil.copy(attacker.metadata / "2.snapshot.json", attacker.metadata / "3.snapshot.json")


def mixed_targets(attacker: Attacker) -> None:
    attacker.publish(2)
    shutil.copy(attacker.metadata / "2.targets.json", attacker.metadata / "3.targets.json")


def mixed_bundles(attacker: Attacker) -> None:
    attacker.publish(2)
    bundle = bundle_path(attacker, 2)
    shutil.copy(bundle_path(attacker, 1), bundle)


def endless_timestamp(attacker: Attacker) -> None:
    make_endless(attacker, attacker.metadata / "timestamp.json")


def endless_root(attacker: Attacker) -> None:
    (attacker.metadata / "2.root.json").write_bytes(b" " * 600_000)
    make_endless(attacker, attacker.metadata / "2.root.json")


def endless_bundle(attacker: Attacker) -> None:
    attacker.publish(2)
    make_endless(attacker, bundle_path(attacker, 2))


def slow_timestamp(attacker: Attacker) -> None:
    make_slow(attacker, "timestamp.json")


def pipe_in_place_of_a_file(attacker: Attacker) -> None:
    """Whoever opens it waits until somebody writes."""
    (attacker.metadata / "timestamp.json").unlink()
    os.mkfifo(attacker.metadata / "timestamp.json")


def device_in_place_of_a_file(attacker: Attacker) -> None:
    attacker.publish(2)
    path = bundle_path(attacker, 2)
    path.unlink()
    path.symlink_to("/dev/zero")


def slow_bundle(attacker: Attacker) -> None:
    attacker.publish(2)
    make_slow(attacker, "tiny-2.0.0")


def wrong_board(attacker: Attacker) -> None:
    attacker.publish(2, boards=("raspberry-pi-5",))


def schema_of_the_manifest(attacker: Attacker) -> None:
    files = bundle_files(attacker.field.model)
    manifest = make_manifest(files, release=2).to_json()
    bundle = attacker.field.directory / "tiny-2.0.0.fieldvit"
    write_zip(bundle, {"manifest.json": manifest.encode(), **files})
    UpdateRepository(attacker.directory, attacker.keys()).publish(bundle, "stable")
    newer = manifest.replace('"schema": 1', '"schema": 9')
    write_zip(bundle, {"manifest.json": newer.encode(), **files})
    replace_target(attacker, "tiny-2.0.0.fieldvit", bundle.read_bytes())


def schema_of_the_channel(attacker: Attacker) -> None:
    pointer = {"schema": 2, "bundle": "tiny-1.0.0.fieldvit", "release": 1, "staged": True}
    replace_target(attacker, "channels/stable.json", json.dumps(pointer).encode())


def too_large_bundle(attacker: Attacker) -> None:
    attacker.publish(2)

    def grow(targets: Any) -> None:
        targets.targets["tiny-2.0.0.fieldvit"].length = 10**12

    attacker.resign_targets(grow)


def old_key_after_rotation(attacker: Attacker) -> None:
    """The timestamp's key was stolen, hence replaced; the board knows. The thief still signs."""
    attacker.cli("rotate", "timestamp")
    look(attacker.field, attacker.directory, passing=True)
    old_key = attacker.keys()[newest_root_of(attacker, 1).roles["timestamp"].keyids[0]]
    metadata = attacker.latest("timestamp")
    metadata.signed.version += 1
    metadata.signatures.clear()
    metadata.sign(old_key)
    (attacker.metadata / "timestamp.json").write_bytes(metadata.to_bytes())


def root_below_its_threshold(attacker: Attacker) -> None:
    """One root key is stolen: it names the thief's keys, and signs for that."""
    root = newest_root(attacker.directory)
    root.version += 1
    thief = CryptoSigner.generate_ed25519()
    root.revoke_key(root.roles["timestamp"].keyids[0], "timestamp")
    root.add_key(thief.public_key, "timestamp")
    metadata = Metadata[Root](root)
    metadata.sign(attacker.keys()[root.roles["root"].keyids[0]])
    (attacker.metadata / "2.root.json").write_bytes(metadata.to_bytes())


def one_signature_counted_twice(attacker: Attacker) -> None:
    root_below_its_threshold(attacker)
    path = attacker.metadata / "2.root.json"
    table = json.loads(path.read_bytes())
    table["signatures"] *= 2
    path.write_text(json.dumps(table))


def nested_metadata(attacker: Attacker) -> None:
    (attacker.metadata / "timestamp.json").write_bytes(b"[" * 16_000)


def extraneous_channel(attacker: Attacker) -> None:
    attacker.field.configure(top='channel = "canary"')
    pointer = {"schema": 1, "bundle": "tiny-1.0.0.fieldvit", "release": 9}
    for name in ("canary.json", f"{'0' * 64}.canary.json"):
        (attacker.directory / "targets" / "channels" / name).write_text(json.dumps(pointer))


def other_release_behind_the_channel(attacker: Attacker) -> None:
    attacker.publish(2)
    pointer = {"schema": 1, "bundle": "tiny-2.0.0.fieldvit", "release": 7}
    replace_target(attacker, "channels/stable.json", json.dumps(pointer).encode())


def other_bundle_behind_the_name(attacker: Attacker) -> None:
    attacker.publish(3)
    attacker.publish(2, channel="other")
    content = bundle_path(attacker, 2).read_bytes()
    replace_target(attacker, "tiny-3.0.0.fieldvit", content)


def unsigned_bundle_behind_the_channel(attacker: Attacker) -> None:
    pointer = {"schema": 1, "bundle": "tiny-4.0.0.fieldvit", "release": 4}
    replace_target(attacker, "channels/stable.json", json.dumps(pointer).encode())


def path_behind_the_channel(attacker: Attacker) -> None:
    pointer = {"schema": 1, "bundle": "../../../etc/passwd", "release": 4}
    replace_target(attacker, "channels/stable.json", json.dumps(pointer).encode())


def channel_goes_back(attacker: Attacker) -> None:
    """The targets' key is stolen as well: the channel points at an older release."""
    attacker.publish(2)
    look(attacker.field, attacker.directory, passing=True)
    pointer = {"schema": 1, "bundle": "tiny-1.0.0.fieldvit", "release": 1}
    replace_target(attacker, "channels/stable.json", json.dumps(pointer).encode())


ATTACKS: dict[Callable[[Attacker], None], str] = {
    wrong_keys: "signature",
    timestamp_rollback: "rollback",
    snapshot_rollback: "rollback",
    targets_rollback: "rollback",
    root_rollback: "rollback",
    freeze: "expired",
    freeze_with_the_clock_set_back: "expired",
    mixed_snapshot: "mixed",
    mixed_targets: "mixed",
    mixed_bundles: "checksum",
    endless_timestamp: "endless",
    endless_root: "endless",
    endless_bundle: "endless",
    slow_timestamp: "slow",
    slow_bundle: "slow",
    pipe_in_place_of_a_file: "unreachable",
    device_in_place_of_a_file: "unreachable",
    wrong_board: "board",
    schema_of_the_manifest: "schema",
    schema_of_the_channel: "schema",
    too_large_bundle: "too-large",
    old_key_after_rotation: "signature",
    root_below_its_threshold: "signature",
    one_signature_counted_twice: "signature",
    nested_metadata: "signature",
    extraneous_channel: "no-channel",
    other_release_behind_the_channel: "pointer",
    other_bundle_behind_the_name: "pointer",
    unsigned_bundle_behind_the_channel: "no-channel",
    path_behind_the_channel: "no-channel",
    channel_goes_back: "rollback",
}
ONLY_ON_THE_WEB = {slow_timestamp, slow_bundle}
ONLY_ON_A_STICK = {pipe_in_place_of_a_file, device_in_place_of_a_file}
WITH_STOLEN_KEYS = {
    snapshot_rollback,
    targets_rollback,
    schema_of_the_channel,
    old_key_after_rotation,
}
"""After these an honest repository must be newer than what the thief has signed, which nothing here makes it."""
CASES = [
    pytest.param(attack, transport, id=f"{attack.__name__}-{transport}")
    for attack in ATTACKS
    for transport in ("dir", "http")
    if attack not in (ONLY_ON_THE_WEB if transport == "dir" else ONLY_ON_A_STICK)
]


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about the disk, and waiting for it would be most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize(("attack", "transport"), CASES)
def test_an_attack_is_refused_and_the_served_model_stays(
    field: Field, attack: Callable[[Attacker], None], transport: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(WebFetch, "slow_window_s", 0.3)
    look(field, field.directory / "repo", passing=True)
    with attacking(field, transport) as (attacker, location):
        attack(attacker)
        served = Slots(field.root).serving()
        assert refusal(attacker, location) == ATTACKS[attack]
        assert Slots(field.root).serving() == served
    assert not list((field.root / "downloads").glob("*.fieldvit"))
    if attack not in WITH_STOLEN_KEYS:
        field.configure()
        for release in (20, 21, 22, 23):  # beyond the versions that an attacker's copy has reached
            field.publish(release)
        look(field, field.directory / "repo", passing=True)
        assert Slots(field.root).serving().release == 23


@pytest.mark.parametrize("transport", ["dir", "http"])
def test_a_board_follows_every_rotation(field: Field, transport: str):
    """All four roles, two at once, and the root keys one after the other."""
    with attacking(field, transport) as (keeper, location):
        for release, roles in enumerate([("timestamp",), ("snapshot", "targets"), ("root",), ("root",)], start=2):
            for role in roles:
                first = newest_root(keeper.directory).roles[role].keyids[0]
                keeper.cli("rotate", role, "--replace", first)
            keeper.publish(release)
            look(field, location, passing=True)
            assert Slots(field.root).serving().release == release
        assert newest_root(keeper.directory).version > 4


@contextmanager
def attacking(field: Field, transport: str) -> Iterator[tuple[Attacker, Path | str]]:
    directory = field.directory / "wrong"
    shutil.copytree(field.directory / "repo", directory)
    if transport == "dir":
        yield Attacker(field, directory), directory
        return
    with serve(directory) as site:
        site.where = "nothing yet"
        yield Attacker(field, directory, site), site.url


def look(field: Field, location: Path | str, *, passing: bool = False, clock: Callable[[], float] = time.time) -> None:
    """One look for an update, served and confirmed if there is one."""

    def selftest(_slot: Path, precision: str) -> SelfTest:
        assert passing, "an attack got as far as the self-test"
        return replace(PASSED, precision=precision)

    slots = Slots(field.root)
    slots.recover(is_start=False)
    trusted_time = TrustedTime(field.root / "clock.json", clock=clock)
    work = Updater(field.root, load_config(field.root), BOARD, slots, run_selftest=selftest, time=trusted_time)
    staged = work.stage(location)
    if staged:
        slots.begin_testing(staged.slot, staged.test.precision)
        slots.confirm(staged.slot)


def refusal(attacker: Attacker, location: Path | str) -> str:
    started = time.monotonic()
    with pytest.raises(UpdateRefusedError) as refused:
        look(attacker.field, location, clock=attacker.clock)
    assert time.monotonic() - started < 10
    return refused.value.reason


def newest_root_of(attacker: Attacker, version: int) -> Root:
    return Metadata[Root].from_file(str(attacker.metadata / f"{version}.root.json")).signed


def bundle_path(attacker: Attacker, release: int) -> Path:
    (path,) = (attacker.directory / "targets").glob(f"*.tiny-{release}.0.0.fieldvit")
    return path


def replace_target(attacker: Attacker, name: str, content: bytes) -> None:
    """Sign for other content of a target."""
    target = TargetFile.from_data(name, content, ["sha256"])
    (attacker.directory / target_path(name, target.hashes["sha256"])).write_bytes(content)
    attacker.resign_targets(lambda targets: targets.targets.update({name: target}))


def make_endless(attacker: Attacker, path: Path) -> None:
    if attacker.site:
        attacker.site.where, attacker.site.endless = path.name, True
    else:
        with path.open("ab") as file:
            file.write(b" " * 3_000_000)


def make_slow(attacker: Attacker, where: str) -> None:
    assert attacker.site
    attacker.site.where, attacker.site.drip_s = where, 0.05
