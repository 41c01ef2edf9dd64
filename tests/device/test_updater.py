"""What an update must pass before it is served: trust, board, budgets, and a self-test in a process of its own."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

import device.selftest
from device.config import load_config
from device.contract.board import Board, load_board
from device.contract.errors import (
    ArtifactError,
    BoardMismatchError,
    DeviceError,
    InterruptedTestError,
    NoVerdictError,
    UpdateRefusedError,
)
from device.selftest import SelfTest, run_in_child
from device.slots import Slots
from device.updater import Updater, candidates, fastest
from tests.support.agent import REPO_ROOT, Field, wait_for
from tests.support.patience import PATIENCE
from tests.support.tiny_bundle import bundle_files, make_manifest, write_zip, wrong_golden

BOARD = load_board("generic-x86-64")
PASSED = SelfTest(
    precision="", golden_difference=0, load_s=0, latency_p50_ms=1, latency_p90_ms=1, latency_p99_ms=1, peak_memory_mb=1
)


def passing(_slot: Path, precision: str) -> SelfTest:
    return replace(PASSED, precision=precision)


def updater(
    field: Field, run_selftest: Callable[[Path, str], SelfTest] | None = passing, board: Board = BOARD
) -> tuple[Updater, Slots]:
    slots = Slots(field.root)
    slots.recover(is_start=False)
    return Updater(field.root, load_config(field.root), board, slots, run_selftest=run_selftest), slots


def serve(field: Field, release: int) -> Slots:
    field.publish(release) if release > 1 else None
    work, slots = updater(field)
    staged = work.stage(field.directory / "repo")
    slots.begin_testing(staged.slot, staged.test.precision)
    slots.confirm(staged.slot)
    return slots


def reason_of(field: Field, work: Updater, **keywords: bool | str) -> str:
    with pytest.raises(UpdateRefusedError) as refused:
        work.stage(field.directory / "repo", **keywords)
    assert "\n" not in str(refused.value)
    return refused.value.reason


def test_a_real_child_process_passes_the_tiny_model(field: Field):
    work, slots = updater(field, run_selftest=None)
    staged = work.stage(field.directory / "repo")
    assert (staged.slot, staged.test.precision) == ("a", "int8")  # as fast as the other: the profile's order decides
    assert staged.test.golden_difference < 1e-4
    assert 10 < staged.test.peak_memory_mb < (300 if PATIENCE == 1 else 1000)  # an emulator's own memory counts too
    assert slots.state("a").state == "staged"
    assert not list((field.root / "downloads").iterdir())


def test_a_candidate_that_fails_is_passed_over(field: Field):
    def int8_fails(_slot: Path, precision: str) -> SelfTest:
        if precision == "int8":
            raise ArtifactError("int8: collapsed")
        return passing(_slot, precision)

    work, _ = updater(field, int8_fails)
    assert work.stage(field.directory / "repo").test.precision == "float32"


def test_the_fastest_that_passes_is_taken(field: Field):
    speeds = {"int8": 1.2, "float32": 1.0}
    work, _ = updater(
        field, lambda _, precision: replace(PASSED, precision=precision, latency_p50_ms=speeds[precision])
    )
    assert work.stage(field.directory / "repo").test.precision == "float32"


@pytest.mark.parametrize(("int8", "float32"), [(1.0, 1.0), (1.09, 1.0), (104.0, 100.0), (0.1, 0.02)])
def test_the_profile_decides_among_those_that_are_as_fast(int8: float, float32: float):
    tests = [replace(PASSED, precision=name, latency_p50_ms=ms) for name, ms in (("int8", int8), ("float32", float32))]
    assert fastest(tests).precision == "int8"


@pytest.mark.parametrize("change", [{"latency_p50_ms": 201.0}, {"peak_memory_mb": 513.0}])
def test_over_budget_is_refused_and_remembered(field: Field, change: dict[str, float]):
    work, slots = updater(field, lambda slot, precision: replace(passing(slot, precision), **change))
    assert reason_of(field, work) == "budget"
    assert slots.state("a").state == "rejected"
    assert slots.serving() is None
    work, slots = updater(field)
    assert reason_of(field, work) == "rejected-before"
    assert work.stage(field.directory / "repo", force=True).slot == "a"


def test_too_many_bytes_are_refused_without_a_test(field: Field):
    board = replace(BOARD, budget=replace(BOARD.budget, artifact_bytes=100))
    work, slots = updater(field, lambda *_: pytest.fail("was tested"), board)
    assert reason_of(field, work) == "budget"
    assert slots.last_number == 0  # no slot was emptied for it


def test_one_artifact_that_fits_is_enough(field: Field):
    large = bundle_files(field.model)["model.int8.tflite"] + bytes(1000)
    field.publish(2, files={"model.int8.tflite": large})
    board = replace(BOARD, budget=replace(BOARD.budget, artifact_bytes=len(large) - 1))
    work, _ = updater(field, board=board)
    assert work.stage(field.directory / "repo").test.precision == "float32"


def test_a_bundle_that_its_manifest_rules_out_is_copied_once(field: Field, monkeypatch: pytest.MonkeyPatch):
    field.publish(2, boards=("raspberry-pi-5",))
    work, _ = updater(field)
    assert reason_of(field, work) == "board"
    monkeypatch.setattr("device.tuf_client.UpdateSource.download", lambda *_, **__: pytest.fail("copied again"))
    assert reason_of(field, work) == "board"


def test_a_bundle_far_beyond_the_board_is_not_copied(field: Field, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.updater.BUNDLE_EXTRA_BYTES", 0)
    board = replace(BOARD, budget=replace(BOARD.budget, artifact_bytes=100))
    work, _ = updater(field, board=board)
    with pytest.raises(UpdateRefusedError, match="takes bundles up to 400") as refused:
        work.stage(field.directory / "repo")
    assert refused.value.reason == "too-large"


def test_a_full_disk_is_a_refusal(field: Field, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    work, slots = updater(field)
    with monkeypatch.context() as patch:
        patch.setattr("device.updater.extract", fail)
        assert reason_of(field, work) == "disk"
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", fail)
        assert reason_of(field, work) == "disk"
    assert slots.serving() is None
    assert work.stage(field.directory / "repo").slot == "a"


def failing_first(error: DeviceError | None, times: int) -> Callable[[Path, str], SelfTest]:
    """A self-test that goes wrong so many times; without an error, it is only slow then."""
    calls: list[str] = []

    def test(slot: Path, precision: str) -> SelfTest:
        calls.append(precision)
        if len(calls) > times:
            return passing(slot, precision)
        if error:
            raise error
        return replace(passing(slot, precision), latency_p50_ms=201.0)

    return test


@pytest.mark.parametrize("error", [NoVerdictError("int8: was killed by SIGKILL"), None])
def test_what_a_busy_board_may_have_caused_is_tried_once_more(field: Field, error: DeviceError | None):
    work, _ = updater(field, failing_first(error, 1))
    assert work.stage(field.directory / "repo").test.precision == "int8"


@pytest.mark.parametrize("error", [NoVerdictError("int8: was killed by SIGKILL"), None])
def test_what_happens_again_counts(field: Field, error: DeviceError | None):
    field.configure(top='precision = "int8"')
    work, slots = updater(field, failing_first(error, 2))
    assert reason_of(field, work) == ("selftest" if error else "budget")
    assert slots.state("a").state == "rejected"


def test_an_interrupted_test_counts_for_nothing(field: Field):
    work, slots = updater(field, failing_first(InterruptedTestError("int8: was killed by SIGTERM"), 1))
    assert reason_of(field, work) == "interrupted"
    assert (slots.state("a").state, slots.state("a").reason) == ("empty", "interrupted")
    assert work.stage(field.directory / "repo").test.precision == "int8"


def test_wrong_outputs_are_refused_by_the_child(field: Field):
    field.publish(2, files=wrong_golden(field.model))
    work, slots = updater(field, run_selftest=None)
    assert reason_of(field, work) == "selftest"
    assert "golden features differ" in slots.state("a").detail


def test_another_board_s_bundle_is_refused(field: Field):
    field.publish(2, boards=("raspberry-pi-5",))
    work, slots = updater(field)
    assert reason_of(field, work) == "board"
    assert slots.state("a").state == "empty"


def test_a_bundle_whose_files_are_not_its_manifests_is_refused(field: Field):
    bundle, files = field.directory / "wrong.fieldvit", bundle_files(field.model)
    manifest = make_manifest(files, release=2).to_json().encode()
    write_zip(bundle, {"manifest.json": manifest, **files, "labels.txt": b"other"})
    field.repository.publish(bundle, "stable")
    work, slots = updater(field)
    assert reason_of(field, work) == "damaged"
    assert slots.state("a").state == "empty"


def test_the_served_release_is_up_to_date_and_older_ones_are_refused(field: Field):
    serve(field, 1)
    work, _ = updater(field)
    assert work.stage(field.directory / "repo") is None
    serve(field, 2)
    field.publish(1, channel="old", version="1.0.1", licence="MIT")
    field.configure(top='channel = "old"')
    work, _ = updater(field)
    assert reason_of(field, work) == "rollback"


def test_another_channel_is_for_one_update(field: Field):
    """So a few boards can take a release before the channel offers it to all."""
    serve(field, 1)
    field.publish(2, channel="canary")
    work, slots = updater(field)
    assert work.stage(field.directory / "repo") is None
    assert work.preview(field.directory / "repo", channel="canary").manifest.release == 2
    staged = work.stage(field.directory / "repo", channel="canary")
    slots.begin_testing(staged.slot, staged.test.precision)
    slots.confirm(staged.slot)
    assert slots.serving().release == 2
    assert reason_of(field, work) == "rollback"
    assert reason_of(field, work, channel="nobody") == "no-channel"


def test_a_model_in_testing_is_not_disturbed(field: Field):
    slots = serve(field, 1)
    field.publish(2)
    work, slots = updater(field)
    staged = work.stage(field.directory / "repo")
    slots.begin_testing(staged.slot, "int8")
    field.publish(3)
    assert reason_of(field, work) == "busy"
    assert (slots.fallback().release, slots.serving().release) == (1, 2)


def test_a_rolled_back_bundle_is_refused_without_download(field: Field):
    serve(field, 1)
    slots = serve(field, 2)
    slots.reject("b", "rolled-back")
    work, _ = updater(field)
    assert reason_of(field, work) == "rejected-before"
    assert not list((field.root / "downloads").iterdir())


def test_candidates_follow_the_board_and_the_pin():
    manifest = make_manifest({f"model.{precision}.tflite": b"" for precision in ("int8", "float32")})
    assert [artifact.precision for artifact in candidates(manifest, BOARD, "")] == ["int8", "float32"]
    assert [artifact.precision for artifact in candidates(manifest, BOARD, "float32")] == ["float32"]
    with pytest.raises(BoardMismatchError, match="set to run float16"):
        candidates(manifest, BOARD, "float16")


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the child's Python by a shell line."""

    def install(line: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        monkeypatch.setattr(device.selftest.sys, "executable", str(path))

    return install


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("kill -SEGV $$", ArtifactError, "int8: the self-test was killed by SIGSEGV"),
        ("kill -40 $$", ArtifactError, "int8: the self-test was killed by signal 40"),
        ("kill -ALRM $$", NoVerdictError, "int8: the self-test did not end within 1 s"),
        ("exec sleep 60", NoVerdictError, "int8: the self-test was killed after 1 s"),
        ("kill -KILL $$", NoVerdictError, "int8: the self-test was killed by SIGKILL"),
        ("kill -TERM $$", InterruptedTestError, "int8: the self-test was killed by SIGTERM"),
        ("kill -INT $$", InterruptedTestError, "int8: the self-test was killed by SIGINT"),
        ("echo noise >&2; echo 'error: it is wrong' >&2; exit 3", ArtifactError, "int8: it is wrong"),
        (r"printf 'error: op \377\n' >&2; exit 3", ArtifactError, "int8: op \N{REPLACEMENT CHARACTER}"),
        ("exit 1", ArtifactError, "int8: no message"),
        ("exit 0", ArtifactError, "int8: the self-test wrote no report, but ''"),
        (r"printf 'INFO \377\n'; exit 0", ArtifactError, "int8: the self-test wrote no report, but 'INFO "),
        ("echo '[]'; exit 0", ArtifactError, "self-test: expected a table, got list"),
    ],
)
def test_how_a_child_fails_is_said(
    fake_python: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    kind: type[DeviceError],
    message: str,
):
    fake_python(line)
    monkeypatch.setattr(device.selftest, "GRACE_S", 0.2)
    with pytest.raises(kind, match=message) as failed:
        run_in_child(Path("slot"), "int8", threads=1, timeout_s=0.8)
    assert type(failed.value) is kind


def test_a_child_that_cannot_be_started_counts_for_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device.selftest.sys, "executable", "/nowhere/python")
    with pytest.raises(InterruptedTestError, match="could not be started"):
        run_in_child(Path("slot"), "int8", threads=1)


def test_noise_before_the_report_is_skipped(fake_python: Callable[[str], None]):
    report = json.dumps(dataclasses.asdict(replace(PASSED, precision="int8")))
    fake_python(f"echo INFO; echo '{report}'")
    assert run_in_child(Path("slot"), "int8", threads=1).precision == "int8"


def test_stop_ends_the_child(field: Field, fake_python: Callable[[str], None]):
    pid, stopped = field.directory / "pid", []
    fake_python(f"echo $$ >{pid}; exec sleep 60")
    stop = threading.Event()
    slots = Slots(field.root)
    work = Updater(field.root, load_config(field.root), BOARD, slots, stop=stop)
    groups: list[int] = []

    def end() -> None:
        wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
        groups.append(os.getpgid(int(pid.read_text())))
        stopped.append(time.monotonic())
        stop.set()

    threading.Thread(target=end).start()
    assert reason_of(field, work) == "interrupted"
    assert time.monotonic() - stopped[0] < 5 * PATIENCE
    assert groups != [os.getpgrp()]  # a signal to our group does not reach it
    assert slots.state("a").state == "empty"
    assert not is_alive(int(pid.read_text()))


def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path):
    os.mkfifo(tmp_path / "manifest.json")  # whoever reads it waits: a self-test that hangs
    script = f"import device.selftest as s, pathlib; s.run_in_child(pathlib.Path({str(tmp_path)!r}), 'int8', threads=1)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPO_ROOT) as parent:
        writer = os.open(tmp_path / "manifest.json", os.O_WRONLY)  # the child has come to read it
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while has_reader(writer):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)
    os.close(writer)


def has_reader(writer: int) -> bool:
    try:
        return os.write(writer, b" ") > 0
    except BrokenPipeError:
        return False


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_ends_itself_when_its_time_is_over(field: Field):
    field.cli("update")
    with pytest.raises(ArtifactError, match="did not end within"):
        run_in_child(field.root / "slots" / "a", "int8", threads=1, timeout_s=0.02)


def test_config_shown_in_its_docstring_is_valid(field: Field):
    import device.config

    (field.root / "agent.toml").write_text(device.config.__doc__.partition("\n")[2])
    table = tomllib.loads((field.root / "agent.toml").read_text())
    config = load_config(field.root)
    assert config.broker.hostname == table["broker"]["hostname"]
    named = {item.name for item in dataclasses.fields(config)}
    assert set(table) == named
