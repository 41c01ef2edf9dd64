"""The keeper of the repository: keys that live apart, rotation by signatures that come one by one, expiry, pruning, crashes."""

import json
import re
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Timestamp

import host.fleet.metadata
from device.contract.errors import UpdateRefusedError
from device.trusted_time import TrustedTime
from device.tuf_client import UpdateSource, open_source
from host.cli import main
from host.cli_publish import PASSPHRASE, publish_app
from host.errors import FleetError
from host.fleet.keys import load_keys
from host.fleet.metadata import issued_of, newest_root, read_current
from host.fleet.repository import channel_offer
from tests.support.bundles import make_manifest, write_plain_bundle

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
VERBS = sorted(command.callback.__name__ for command in publish_app.registered_commands)


class Desk:
    """Who keeps a repository, and a board that follows it."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self._capsys = directory, capsys
        self.repo, self.keys, self.safe, self.board = (directory / name for name in ("repo", "keys", "safe", "board"))
        self.said, self.wrong = "", ""

    def run(self, *arguments: object, code: int = 0) -> str:
        words = [str(argument) for argument in arguments]
        found = main(["publish", *words, "--repo", str(self.repo), "--keys", str(self.keys)])
        self.said, self.wrong = self._capsys.readouterr()
        assert (found != 0) == (code != 0), self.said + self.wrong
        return self.said if not code else self.wrong

    def bundle(self, release: int) -> Path:
        manifest = make_manifest(release=release, version=f"{release}.0.0")
        return write_plain_bundle(self.directory / f"{release}.fieldvit", manifest)

    def flash(self) -> None:
        self.board.mkdir()
        shutil.copy(self.repo / "metadata" / "1.root.json", self.board / "root.json")

    def look(self) -> int:
        """The release that a board is offered, downloaded."""
        source = UpdateSource(open_source(self.repo), self.board, time=TrustedTime(self.board / "clock.json"))
        offer = source.offer("stable")
        source.download(offer, max_bytes=1 << 20)
        return offer.release


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    """A repository whose root keys lie in a safe, with release 1, and a board that has seen it."""
    desk = Desk(tmp_path, capsys)
    desk.run("init", "--root-keys-to", desk.safe)
    desk.run(desk.bundle(1))
    desk.flash()
    assert desk.look() == 1
    return desk


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str], verb: str):
    assert main(["publish", verb, "--help"]) == 0
    assert f"Example: fieldvit publish {verb}" in " ".join(capsys.readouterr().out.split())
    assert re.search(rf"`fieldvit publish [a-z/ ]*\b{verb}\b", README)


def test_keys_lie_apart_and_are_private(desk: Desk):
    assert sorted(path.name for path in desk.keys.iterdir()) == ["snapshot.pem", "targets.pem", "timestamp.pem"]
    assert sorted(path.name for path in desk.safe.iterdir()) == ["root-1.pem", "root-2.pem", "root-3.pem"]
    desk.run("rotate", "snapshot")
    for directory in (desk.keys, desk.safe):
        assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_publishing_needs_no_root_key(desk: Desk):
    shutil.rmtree(desk.safe)
    desk.run("--channel", "stable", desk.bundle(2))
    assert desk.look() == 2


def test_a_key_is_replaced_by_signatures_that_come_one_by_one(desk: Desk):
    said = desk.run("rotate", "timestamp")
    assert "root 2 has 0 of 2 signatures of the present root keys" in said
    old = (desk.keys / "timestamp.pem").read_bytes()
    desk.run("add", desk.bundle(2))  # meanwhile all goes on as before
    assert desk.look() == 2
    assert "1 of 2" in desk.run("sign", "root", "--root-key", desk.safe / "root-3.pem")
    assert "1 of 2" in desk.run("sign", "root", "--root-key", desk.safe / "root-3.pem")  # it does not count twice
    assert "is valid until" in desk.run("sign", "--root-key", desk.safe / "root-1.pem")
    assert desk.look() == 2
    (desk.keys / "timestamp.pem").unlink()
    desk.run("add", desk.bundle(3))
    assert desk.look() == 3
    (desk.keys / "timestamp-2.pem").write_bytes(old)
    assert "the timestamp key is missing" in desk.run("add", desk.bundle(4), code=1)


def test_a_root_key_may_sign_on_a_machine_of_its_own(desk: Desk):
    desk.run("rotate", "root", "--replace", newest_root(desk.repo).roles["root"].keyids[0], "--new-key-to", desk.safe)
    online = desk.keys.rename(desk.directory / "elsewhere")
    for name in ("root-2", "root-3"):
        desk.run("sign", "root", "--root-key", desk.safe / f"{name}.pem")
    said = desk.run("sign", "root", "--root-key", desk.safe / "root-4.pem")
    assert newest_root(desk.repo).version >= 2
    assert "root" in said
    online.rename(desk.keys)
    desk.run(desk.bundle(2))
    assert desk.look() == 2


def test_mistakes_are_one_line(desk: Desk):
    assert "role 'boss' is unknown; it is one of timestamp" in desk.run("rotate", "boss", code=1)
    assert "--replace '' names 3 of the root keys; they are" in desk.run("rotate", "root", code=1)
    assert "is an update repository already" in desk.run("init", code=1)
    assert "no such signing key" in desk.run("sign", "root", "--root-key", "nowhere.pem", code=1)
    (desk.keys / "snapshot.pem").write_text("-----BEGIN PRIVATE KEY-----")
    assert "snapshot.pem: not a usable private key" in desk.run("sign", code=1)
    assert main(["publish", "expire", "--repo", str(desk.directory / "no")]) == FleetError.exit_code


def test_thresholds_are_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    desk = Desk(tmp_path, capsys)
    assert "must be 1 to 3" in desk.run("init", "--root-threshold", "4", code=1)
    assert not desk.keys.exists()
    desk.run("init", "--root-keys", "5", "--root-threshold", "3")
    root = newest_root(desk.repo)
    assert (root.roles["root"].threshold, len(root.roles["root"].keyids)) == (3, 5)


def test_keys_may_be_encrypted(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    desk = Desk(tmp_path, capsys)
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    desk.run("init", "--passphrase-file", secret)
    assert all(b"ENCRYPTED" in path.read_bytes() for path in desk.keys.iterdir())
    assert f"is encrypted; set {PASSPHRASE}" in desk.run(desk.bundle(1), code=1)
    monkeypatch.setenv(PASSPHRASE, "wrong")
    assert "not a usable private key, or another passphrase" in desk.run(desk.bundle(1), code=1)
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    desk.run(desk.bundle(1))
    assert "correct" not in desk.run("rotate", "targets")
    assert b"ENCRYPTED" in (desk.keys / "targets-2.pem").read_bytes()
    secret.write_text("\n")
    assert "first line is empty" in desk.run("sign", "--passphrase-file", secret, code=1)


def test_what_expires_is_shown_and_renewed(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    rows = json.loads(desk.run("expire", "--json"))["roles"]
    left = {row["role"]: row["days_left"] for row in rows}
    for role, days in host.fleet.metadata.LIFETIME_DAYS.items():
        assert days - 1 <= left[role] <= days
    before = read_current(desk.repo)
    desk.run("expire", "--renew")
    assert read_current(desk.repo).timestamp.version == before.timestamp.version
    desk.run("expire", "--renew", "--within", "31")
    after = read_current(desk.repo)
    assert (after.timestamp.version, after.targets.version) == (before.timestamp.version + 1, before.targets.version)
    assert issued_of(after.timestamp) > issued_of(before.timestamp)
    assert "the root metadata ends soon" in desk.run("expire", "--within", "400")
    assert desk.look() == 1


def test_what_the_timestamp_needs_outlives_it(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(host.fleet.metadata.LIFETIME_DAYS, "timestamp", 100)
    assert "targets, snapshot, timestamp" in desk.run("sign")
    current = read_current(desk.repo)
    assert issued_of(current.targets) == issued_of(current.timestamp)


def test_a_clock_that_was_ahead_stops_no_board(desk: Desk):
    """Once signed in the future, always later than that: else boards that saw it would call the rest expired."""
    path = desk.repo / "metadata" / "timestamp.json"
    metadata = Metadata[Timestamp].from_file(str(path))
    future = datetime.now(UTC).replace(microsecond=0) + timedelta(days=900)
    metadata.signed.version += 1
    metadata.signed.unrecognized_fields["issued"] = f"{future:%Y-%m-%dT%H:%M:%SZ}"
    metadata.signed.expires = future + timedelta(days=30)
    (signer,) = load_keys([desk.keys / "timestamp.pem"]).values()
    metadata.sign(signer)
    path.write_bytes(metadata.to_bytes())
    with pytest.raises(UpdateRefusedError, match="expired"):  # by then, targets and root have ended
        desk.look()
    desk.run("sign", "targets")
    assert issued_of(read_current(desk.repo).timestamp) > future
    for number in (1, 2):
        desk.run("sign", "root", "--root-key", desk.safe / f"root-{number}.pem")
    desk.run("add", desk.bundle(2))
    assert desk.look() == 2


def test_prune_keeps_what_channels_point_at_and_the_newest(desk: Desk):
    desk.run(desk.bundle(1), "--channel", "old")
    for release in (2, 3, 4, 5):
        desk.run(desk.bundle(release))
    assert (
        desk.run("prune", "--keep", "1", "--dry-run")
        == "would remove plain-2.0.0.fieldvit\nwould remove plain-3.0.0.fieldvit\n"
    )
    (desk.repo / "targets" / ("0" * 64 + ".left-1.0.0.fieldvit")).write_bytes(b"by an interrupted call")
    desk.run("prune", "--keep", "1")
    left = sorted(path.name.partition(".")[2] for path in (desk.repo / "targets").rglob("*.fieldvit"))
    assert left == ["plain-1.0.0.fieldvit", "plain-4.0.0.fieldvit", "plain-5.0.0.fieldvit"]
    assert len(list((desk.repo / "targets" / "parts").iterdir())) == 3
    assert "every bundle is pointed at" in desk.run("prune", "--keep", "1")
    assert channel_offer(desk.repo, "old").release == 1
    assert desk.look() == 5


def test_old_metadata_go_and_roots_stay(desk: Desk):
    for _ in range(12):
        desk.run("sign", "targets")
    desk.run("prune")
    names = [path.name for path in (desk.repo / "metadata").iterdir()]
    assert len([name for name in names if "targets" in name]) == 10
    assert "1.root.json" in names
    assert desk.look() == 1


class _PowerCutError(BaseException):
    """The machine stops here."""


@pytest.mark.parametrize("change", ["add", "sign", "prune", "rotate"])
def test_a_cut_at_any_write_leaves_a_repository_that_boards_can_use(
    desk: Desk, change: str, monkeypatch: pytest.MonkeyPatch
):
    """Cut before each write in turn, then go on: the next call does it."""
    desk.run(desk.bundle(2))
    for number in (1, 2, 3):
        (desk.safe / f"root-{number}.pem").rename(desk.keys / f"root-{number}.pem")
    arguments = {
        "add": ("add", desk.bundle(3)),
        "sign": ("sign", "targets"),
        "prune": ("prune", "--keep", "0"),
        "rotate": ("rotate", "timestamp"),
    }[change]
    saved = desk.directory / "saved"
    for name in ("repo", "keys", "board"):
        shutil.copytree(desk.directory / name, saved / name, symlinks=True)
    cuts = 0
    while cut_run(desk, arguments, cuts, monkeypatch):
        assert desk.look() in (2, 3)
        again = ("sign", "root") if change == "rotate" and (desk.repo / "pending-root.json").exists() else arguments
        if not (change == "add" and desk.look() == 3):
            desk.run(*again)
        desk.run("sign")
        assert desk.look() == (3 if change == "add" else 2)
        cuts += 1
        for name in ("repo", "keys", "board"):
            shutil.rmtree(desk.directory / name)
            shutil.copytree(saved / name, desk.directory / name, symlinks=True)
    assert cuts >= 3


def cut_run(desk: Desk, arguments: tuple[object, ...], after: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a verb; False if it ended before `after` files were written or removed."""
    import os

    left = [after]

    def cutting(call):
        def cut(*arguments, **keywords):
            if left[0] == 0:
                raise _PowerCutError
            left[0] -= 1
            return call(*arguments, **keywords)

        return cut

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", cutting(os.replace))
        patch.setattr("pathlib.Path.unlink", cutting(Path.unlink))
        try:
            desk.run(*arguments)
        except _PowerCutError:
            return True
    return False
