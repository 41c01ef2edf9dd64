"""Each way in which an update source can be wrong is refused with its own reason, and a good source still works after."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import host.fleet.metadata
from device.contract.errors import ConfigError, UpdateRefusedError
from device.trusted_time import TrustedTime
from device.tuf_client import UpdateSource, open_source
from host.fleet.repository import UpdateRepository
from tests.support.bundles import make_manifest, write_plain_bundle


@pytest.fixture
def repo(tmp_path: Path) -> UpdateRepository:
    repo = UpdateRepository.open_or_create(tmp_path / "repo", tmp_path / "keys")
    publish(repo, 1)
    root = tmp_path / "root"
    root.mkdir()
    (root / "root.json").write_bytes(repo.root_bytes)
    return repo


def publish(repo: UpdateRepository, release: int) -> None:
    manifest = make_manifest(release=release, version=f"{release}.0.0")
    repo.publish(write_plain_bundle(repo.directory.parent / f"{release}.fieldvit", manifest), "stable")


def fetch(tmp_path: Path, source: str = "repo", channel: str = "stable", max_bytes: int = 1 << 20) -> Path:
    root = tmp_path / "root"
    update_source = UpdateSource(open_source(tmp_path / source), root, time=TrustedTime(root / "clock.json"))
    return update_source.download(update_source.offer(channel), max_bytes=max_bytes).path


def bundle_target(directory: Path) -> Path:
    (path,) = (directory / "targets").glob("*.plain-1.0.0.fieldvit")
    return path


def flip_a_byte(directory: Path) -> None:
    path = bundle_target(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sign_with_other_keys(directory: Path) -> None:
    shutil.rmtree(directory)
    publish(UpdateRepository.open_or_create(directory, directory.parent / "other-keys"), 1)


def expire(directory: Path) -> None:
    keys = directory.parent / "keys"
    lifetimes = {**host.fleet.metadata.LIFETIME_DAYS, "timestamp": -1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.fleet.metadata, "LIFETIME_DAYS", lifetimes)
        publish(UpdateRepository.open_or_create(directory, keys), 2)


WRONG: dict[str, Callable[[Path], object]] = {
    "signature": sign_with_other_keys,
    "checksum": flip_a_byte,
    "endless": lambda directory: bundle_target(directory).write_bytes(bundle_target(directory).read_bytes() + b"more"),
    "expired": expire,
    "unreachable": shutil.rmtree,
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_source_is_refused_and_the_right_one_still_works(repo: UpdateRepository, tmp_path: Path, reason: str):
    shutil.copytree(tmp_path / "repo", tmp_path / "wrong")
    WRONG[reason](tmp_path / "wrong")
    with pytest.raises(UpdateRefusedError) as refused:
        fetch(tmp_path, "wrong")
    assert refused.value.reason == reason
    assert f"refused ({reason})" in str(refused.value)
    assert not list((tmp_path / "root" / "downloads").glob("*.fieldvit"))
    if reason == "expired":  # its timestamp was rightly signed, so nothing older is trusted any more
        publish(repo, 2)
    assert fetch(tmp_path).name.startswith("plain-")


def test_an_older_copy_of_the_source_is_a_rollback(repo: UpdateRepository, tmp_path: Path):
    shutil.copytree(tmp_path / "repo", tmp_path / "old")
    publish(repo, 2)
    assert fetch(tmp_path).name == "plain-2.0.0.fieldvit"
    with pytest.raises(UpdateRefusedError, match="refused \\(rollback\\)") as refused:
        fetch(tmp_path, "old")
    assert refused.value.reason == "rollback"
    assert fetch(tmp_path).name == "plain-2.0.0.fieldvit"


def test_unknown_channel_says_how_to_make_it(repo: UpdateRepository, tmp_path: Path):
    with pytest.raises(UpdateRefusedError, match="publish --channel canary") as refused:
        fetch(tmp_path, channel="canary")
    assert refused.value.reason == "no-channel"


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b'{"signed": {}, "signatures": []}'])
def test_damaged_metadata_is_refused(repo: UpdateRepository, tmp_path: Path, name: str, content: bytes | None):
    path = tmp_path / "repo" / "metadata" / name
    good = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UpdateRefusedError) as refused:
        fetch(tmp_path)
    of_snapshot = "unreachable" if content is None else "mixed"  # their length and hash are signed for
    of_timestamp = "unreachable" if content is None else "signature"
    assert refused.value.reason == (of_timestamp if name == "timestamp.json" else of_snapshot)
    path.write_bytes(good)
    assert fetch(tmp_path).exists()


def test_missing_or_foreign_trusted_root_is_a_configuration_error(repo: UpdateRepository, tmp_path: Path):
    for content in (None, b"no JSON"):
        path = tmp_path / "root" / "root.json"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"copy 1\.root\.json"):
            fetch(tmp_path)


def test_a_bundle_that_does_not_fit_is_too_large(repo: UpdateRepository, tmp_path: Path):
    with pytest.raises(UpdateRefusedError, match="this board takes bundles up to 10") as refused:
        fetch(tmp_path, max_bytes=10)
    assert refused.value.reason == "too-large"


def test_a_complete_download_is_used_again_and_a_damaged_one_is_not(repo: UpdateRepository, tmp_path: Path):
    path = fetch(tmp_path)
    inode, content = path.stat().st_ino, path.read_bytes()
    assert fetch(tmp_path).stat().st_ino == inode
    path.write_bytes(content[:-1])
    assert fetch(tmp_path).read_bytes() == content


@pytest.mark.parametrize("directory", ["tuf", "downloads"])
def test_a_disk_that_fails_is_refused_as_such(repo: UpdateRepository, tmp_path: Path, directory: str):
    (tmp_path / "root" / directory).write_bytes(b"a file where a directory should be")
    with pytest.raises(UpdateRefusedError, match="refused \\(disk\\)") as refused:
        fetch(tmp_path)
    assert refused.value.reason == "disk"


@pytest.mark.parametrize("call", ["os.fsync", "shutil.disk_usage", "os.replace", "pathlib.Path.iterdir"])
def test_a_disk_that_is_full_is_refused_as_such(
    repo: UpdateRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(UpdateRefusedError, match="No space left") as refused:
            fetch(tmp_path)
    assert refused.value.reason == "disk"
    assert not list((tmp_path / "root" / "downloads").iterdir())
    assert fetch(tmp_path).name == "plain-1.0.0.fieldvit"
