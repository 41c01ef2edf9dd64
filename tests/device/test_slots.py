"""Slots after a power cut at any point: there is always a whole confirmed model, and the next update works."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from device.contract.bundle import extract, verify_directory
from device.contract.errors import AgentBusyError, ArtifactError
from device.reporter import event_kind
from device.slots import CRASH_WINDOW_S, MAX_CRASHES, MAX_TEST_STARTS, MAX_TEST_STARTS_EVER, NAMES, Slots
from tests.support.bundles import make_manifest, write_plain_bundle

SYSTEM_CALLS = ("replace", "fsync", "pwrite", "ftruncate", "open", "mkdir", "rmdir", "unlink", "symlink", "rename")


class PowerCut(BaseException):
    """Not an Exception: nothing may catch it."""


def bundle_of(directory: Path, release: int) -> Path:
    path = directory / f"plain-{release}.fieldvit"
    return path if path.exists() else write_plain_bundle(path, make_manifest(release=release, version=f"{release}.0.0"))


def install(root: Path, release: int, *, confirm: bool = True) -> Slots:
    slots = Slots(root, clock=lambda: 1.0)
    bundle = bundle_of(root.parent, release)
    entry = slots.stage(f"hash-{release}", lambda directory: extract(bundle, directory))
    slots.begin_testing(entry.slot, "int8")
    if confirm:
        slots.confirm(entry.slot)
    return slots


def require_consistent(root: Path, releases: set[int]) -> None:
    slots = Slots(root)
    slots.recover(is_start=True)
    serving, fallback = slots.serving(), slots.fallback()
    assert all(slots.state(slot).state != "staged" for slot in NAMES)
    assert serving.release in releases
    assert verify_directory(slots.directory(serving.slot)).release == serving.release
    assert verify_directory(slots.directory(fallback.slot)).release == fallback.release
    assert os.readlink(root / "current") == f"slots/{serving.slot}"
    assert {path.name for path in (root / "slots").iterdir()} <= set(NAMES)
    assert not (root / "current.tmp").is_symlink()


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies loses nothing it wrote, synced or not; a thousand real syncs would take a minute."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    install(root, 1)
    return root


def count_calls(monkeypatch: pytest.MonkeyPatch, limit: int | None, *, longest_write: int = 1 << 30) -> list[str]:
    """Let the process die before its `limit`-th system call that changes the disk; returns the calls made.

    A `pwrite` writes at most `longest_write` bytes, as any may, so a cut can fall into the middle of a line.
    """
    calls: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **keywords: object) -> object:
            if limit is not None and len(calls) == limit:
                raise PowerCut
            calls.append(name)
            if name == "pwrite":
                descriptor, content, offset = arguments
                arguments = (descriptor, content[:longest_write], offset)
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    for name in SYSTEM_CALLS:
        wrap(name)
    return calls


def update(root: Path) -> None:
    Slots(root).recover(is_start=True)
    install(root, 2)
    install(root, 3, confirm=False).reject("a", "engine")
    install(root, 4)


@pytest.mark.parametrize("longest_write", [1 << 30, 200])
def test_power_cut_before_any_write(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_write: int):
    with monkeypatch.context() as patch:
        copy = fresh_copy(root, tmp_path / "whole" / "root")
        calls = count_calls(patch, None, longest_write=longest_write)
        update(copy)
    require_consistent(copy, {4})
    total = len(calls)
    for limit in range(total):
        copy = fresh_copy(root, tmp_path / "cut" / "root")
        with monkeypatch.context() as patch:
            count_calls(patch, limit, longest_write=longest_write)
            with pytest.raises(PowerCut):
                update(copy)
        require_consistent(copy, {1, 2, 3, 4})
        if Slots(copy).serving().state == "testing":
            Slots(copy).confirm(Slots(copy).serving().slot)
        install(copy, 5)
        require_consistent(copy, {5})
    assert total > 100


def fresh_copy(root: Path, target: Path) -> Path:
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir()
    for release in (2, 3, 4, 5):
        bundle_of(target.parent, release)
    shutil.copytree(root, target, symlinks=True)
    return target


def test_journal_torn_at_any_byte(root: Path, tmp_path: Path):
    first = (root / "journal.jsonl").stat().st_size
    install(root, 2, confirm=False)
    content = (root / "journal.jsonl").read_bytes()
    for size in range(first, len(content) + 1):
        copy = tmp_path / "torn"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy, symlinks=True, copy_function=os.link)
        (copy / "journal.jsonl").unlink()
        (copy / "journal.jsonl").write_bytes(content[:size])
        require_consistent(copy, {1, 2})
        assert Slots(copy).fallback().release == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, None])
def test_a_full_disk_leaves_the_journal_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch, error: int | None):
    before, real, writes = (root / "journal.jsonl").read_bytes(), os.pwrite, []

    def nearly_full(descriptor: int, content: bytes, offset: int) -> int:
        writes.append(offset)
        if len(writes) == 1:
            return real(descriptor, content[:40], offset)
        if error:
            raise OSError(error, os.strerror(error))
        return 0

    slots = Slots(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", nearly_full)
        with pytest.raises(OSError, match="No space left" if error else "nothing was written"):
            slots.reject("a", "engine")
    assert (root / "journal.jsonl").read_bytes() == before
    assert slots.state("a").state == "confirmed"
    slots.reject("a", "engine")
    assert Slots(root).state("a").state == "rejected"
    assert not Slots(root).recover(is_start=False)


def test_a_bundle_that_does_not_fit_leaves_no_half_of_it(root: Path):
    def half(directory: Path) -> NoReturn:
        directory.mkdir()
        (directory / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Slots(root).stage("hash-2", half)
    assert not (root / "slots" / "b.tmp").exists()
    require_consistent(root, {1})


def test_model_that_never_confirms_is_reverted(root: Path):
    install(root, 2, confirm=False)
    for _ in range(MAX_TEST_STARTS):
        slots = Slots(root)
        slots.recover(is_start=True)
        assert slots.serving().release == 2
    slots = Slots(root)
    assert "3 starts within 10 minutes without confirmation" in slots.recover(is_start=True)[0]
    assert slots.serving().release == 1
    assert slots.rejection("hash-2").reason == "crash-loop"


def start_at(root: Path, now: float, *, crash: str = "", stop: bool = False) -> Slots:
    slots = Slots(root, clock=lambda: now)
    slots.recover(is_start=True, crash=crash)
    if stop:
        slots.stop()
    return slots


def test_starts_far_apart_are_no_crash_loop_until_they_are_many(root: Path):
    install(root, 2, confirm=False)
    for number in range(MAX_TEST_STARTS_EVER):
        assert start_at(root, number * CRASH_WINDOW_S).serving().release == 2
    assert start_at(root, 1e6).serving().release == 1
    assert Slots(root).state("b").detail == "10 starts without confirmation"


def test_starts_that_end_in_good_order_are_not_held_against_a_model(root: Path):
    install(root, 2, confirm=False)
    for _ in range(3 * MAX_TEST_STARTS_EVER):
        assert start_at(root, 2.0, stop=True).serving().release == 2
    for _ in range(MAX_TEST_STARTS):
        assert start_at(root, 3.0).serving().release == 2
    assert start_at(root, 3.0).rejection("hash-2").reason == "crash-loop"


def test_a_clock_that_goes_back_hides_no_crash_loop(root: Path):
    install(root, 2, confirm=False)
    for number in range(MAX_TEST_STARTS):
        start_at(root, 1e9 - 1e6 * number)
    assert start_at(root, 0.0).serving().release == 1


def test_a_confirmed_model_that_keeps_crashing_gives_way_to_the_one_before(root: Path):
    install(root, 2)
    for _ in range(MAX_CRASHES):
        assert start_at(root, 2.0, crash="it died").serving().release == 2
    slots = start_at(root, 2.0, crash="it died")
    assert (slots.serving().release, slots.state("b").reason) == (1, "crash-loop")
    for _ in range(2 * MAX_CRASHES):  # nothing is left to go back to
        assert start_at(root, 2.0, crash="it died").serving().release == 1
    assert [event_kind(entry) for entry in slots.history()[-3:]] == ["error", "error", "rolled-back"]


def test_crashes_far_apart_and_clean_starts_change_nothing(root: Path):
    install(root, 2)
    for number in range(3 * MAX_CRASHES):
        start_at(root, number * CRASH_WINDOW_S, crash="it died")
        before = Slots(root).last_number
        assert start_at(root, number * CRASH_WINDOW_S).serving().release == 2
        assert Slots(root).last_number == before


def test_a_hanging_model_is_rejected_unless_the_lock_hangs_too(root: Path):
    slots = install(root, 2, confirm=False)
    held, done = threading.Event(), threading.Event()

    def hang() -> None:
        with slots._lock:
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hang)
    thread.start()
    held.wait(10)
    assert not slots.reject_hanging("b", "silent", timeout_s=0.01)
    done.set()
    thread.join()
    assert slots.reject_hanging("b", "silent", timeout_s=1)
    assert slots.rejection("hash-2").reason == "hang"
    assert slots.reject_hanging("a", "silent", timeout_s=1)  # confirmed: not touched
    assert slots.serving().release == 1


def test_a_journal_of_a_newer_agent_is_read(root: Path):
    journal = root / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"number"', b'"altitude": 3, "number"') + b"3\n")
    slots = Slots(root)
    assert "1 damaged lines" in slots.recover(is_start=True)[0]
    assert slots.serving().release == 1


def test_verbs_do_not_count_as_starts(root: Path):
    install(root, 2, confirm=False)
    for _ in range(2 * MAX_TEST_STARTS):
        Slots(root).recover(is_start=False)
    assert Slots(root).serving().release == 2


def test_a_model_in_testing_is_never_overwritten(root: Path):
    slots = install(root, 2, confirm=False)
    with pytest.raises(AgentBusyError, match="slot b is still in testing"):
        install(root, 3)
    assert slots.fallback().release == 1


def test_rollback_needs_an_earlier_confirmed_model(root: Path):
    with pytest.raises(ArtifactError, match="no earlier confirmed model"):
        Slots(root).rollback_target()
    assert install(root, 2).rollback_target().release == 1


def test_confirming_again_lifts_a_rejection(root: Path):
    install(root, 2, confirm=False).reject("b", "engine", "it failed")
    assert os.readlink(root / "current") == "slots/a"
    assert Slots(root).rejection("hash-2").detail == "it failed"
    install(root, 2)
    assert Slots(root).rejection("hash-2") is None


def test_damage_to_a_proven_model_is_not_held_against_its_bundle(root: Path):
    slots = install(root, 2)
    slots.reject("b", "load", "model.tflite: sha256 differs")
    assert slots.rejection("hash-2") is None
    slots = install(root, 3, confirm=False)
    slots.reject("b", "load", "LiteRT cannot load it")
    assert slots.rejection("hash-3").reason == "load"


def test_a_discarded_bundle_may_come_again(root: Path):
    slots = Slots(root)
    slots.stage("hash-2", lambda directory: extract(bundle_of(root.parent, 2), directory))
    slots.discard("b", "interrupted")
    assert (slots.state("b").state, slots.state("b").reason) == ("empty", "interrupted")
    assert slots.rejection("hash-2") is None
    require_consistent(install(root, 2).root, {2})


def test_damaged_lines_are_reported_and_ignored(root: Path):
    journal = root / "journal.jsonl"
    journal.write_bytes(b"garbage\n" + journal.read_bytes())
    slots = Slots(root)
    assert "1 damaged lines" in slots.recover(is_start=True)[0]
    assert slots.serving().release == 1


def test_a_long_journal_is_compacted_and_keeps_its_states(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.journal.MAX_BYTES", 2000)
    monkeypatch.setattr("device.journal.KEEP_LINES", 3)
    for release in range(2, 8):
        install(root, release)
    before = [Slots(root).state(slot) for slot in NAMES]
    Slots(root).recover(is_start=True)
    assert [Slots(root).state(slot) for slot in NAMES] == before
    assert len(Slots(root).history()) <= 5
