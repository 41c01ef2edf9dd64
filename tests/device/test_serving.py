"""Probation: a model confirms after its soak, and gives way to the one before at the first error."""

import errno
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from device.contract.board import load_board
from device.contract.bundle import extract
from device.contract.errors import ArtifactError, ChecksumError, EngineError, UpdateRefusedError
from device.engine import Engine
from device.serving import Serving
from device.slots import Slots
from tests.support.tiny_bundle import LABELS, TinyModel, make_frames, write_bundle, wrong_golden

RUNTIME = load_board("generic-x86-64").runtime


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A data directory and a server of models, without an agent."""

    def __init__(self, directory: Path, model: TinyModel) -> None:
        self.root, self.model, self.clock = directory / "root", model, Clock()
        self.root.mkdir()
        self.slots = Slots(self.root)
        self.serving = Serving(self.slots, RUNTIME, clock=self.clock)

    def activate(self, release: int, **files: bytes) -> None:
        bundle = write_bundle(self.root.parent, self.model, release=release, files=files)
        entry = self.slots.stage(f"hash-{release}", lambda directory: extract(bundle, directory))
        self.serving.activate(entry.slot, "int8")

    def confirm(self) -> None:
        self.clock.now += RUNTIME.soak_s
        assert self.serving.is_soaked()
        self.serving.end_probation()

    @property
    def release(self) -> int:
        return self.serving.model.manifest.release


@pytest.fixture
def bench(tmp_path: Path, tiny_model: TinyModel) -> Bench:
    bench = Bench(tmp_path, tiny_model)
    bench.activate(1)
    bench.confirm()
    return bench


def test_soak_ends_after_frames_or_time(bench: Bench):
    bench.activate(2)
    assert bench.serving.is_testing
    assert not bench.serving.is_soaked()
    for _ in range(RUNTIME.soak_frames):
        bench.serving.count_good_frame(bench.serving.model)
    assert bench.serving.is_soaked()
    bench.serving.confirm()
    assert not bench.serving.is_testing
    assert bench.slots.fallback().release == bench.release == 2


def test_an_error_on_probation_goes_back_at_once(bench: Bench):
    bench.activate(2)
    bench.serving.revert(bench.serving.model, "engine", "it failed")
    assert (bench.release, bench.serving.is_testing) == (1, False)
    assert bench.serving.model.infer(make_frames(1, 1)[0])[1].label == LABELS[1]
    assert bench.slots.rejection("hash-2").reason == "engine"


def test_an_error_of_a_model_that_was_replaced_meanwhile_does_nothing(bench: Bench):
    bench.activate(2)
    failing = bench.serving.model
    bench.serving.rollback()  # by the updates thread, while the frame loop is in `infer`
    bench.serving.revert(failing, "engine", "it failed")
    bench.serving.count_bad_frame(failing, "it failed")
    assert (bench.release, bench.slots.state("a").state) == (1, "confirmed")
    assert bench.slots.rejection("hash-2").reason == "rolled-back"


def test_an_error_after_the_confirmation_rejects_nothing(bench: Bench):
    bench.serving.revert(bench.serving.model, "engine", "it failed")
    assert (bench.release, bench.slots.state("a").state) == (1, "confirmed")


@pytest.mark.parametrize("good_frames", [0, 1])
def test_a_model_that_can_use_no_frame_is_not_confirmed(bench: Bench, good_frames: int):
    bench.activate(2)
    for _ in range(3):
        bench.serving.count_bad_frame(bench.serving.model, "x.npy: 3 channels")
    for _ in range(good_frames):
        bench.serving.count_good_frame(bench.serving.model)
    bench.confirm()
    assert bench.release == 1 + good_frames
    if not good_frames:
        assert bench.slots.state("b").reason == "frames"
        assert bench.slots.state("b").detail == "not one of 3 frames could be used: x.npy: 3 channels"


def without_memory(*_: object, **__: object) -> NoReturn:
    raise EngineError("LiteRT cannot load it")


def test_a_passing_trouble_at_load_rejects_no_sound_model_for_good(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.serving.LOAD_PAUSE_S", 0)
    bench.activate(2)
    bench.confirm()
    serving = Serving(bench.slots, RUNTIME)
    with monkeypatch.context() as patch:
        patch.setattr("device.serving.Engine", without_memory)
        serving.start()
    assert serving.model is None
    assert bench.slots.state("a").state == "confirmed"  # the last whole model is kept for the next attempt
    assert bench.slots.rejection("hash-2") is None  # the newer one may be installed again
    serving.start()
    assert serving.model.manifest.release == 1


def test_a_trouble_that_passes_at_once_is_not_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.serving.LOAD_PAUSE_S", 0)
    attempts = iter([without_memory, Engine])
    monkeypatch.setattr("device.serving.Engine", lambda *args, **keywords: next(attempts)(*args, **keywords))
    serving = Serving(bench.slots, RUNTIME)
    serving.start()
    assert serving.model.manifest.release == 1


def test_a_slot_that_cannot_be_read_is_damaged(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("device.serving.verify_directory", fail)
    serving = Serving(bench.slots, RUNTIME)
    serving.start()
    assert (bench.slots.state("a").state, bench.slots.state("a").reason) == ("rejected", "load")
    assert bench.slots.rejection("hash-1") is None


def test_a_journal_that_cannot_be_written_refuses_the_change(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.activate(2)
    bench.confirm()
    monkeypatch.setattr("os.pwrite", lambda *_: 0)
    with pytest.raises(UpdateRefusedError, match="journal cannot be written") as refused:
        bench.serving.rollback()
    assert (refused.value.reason, bench.release) == ("disk", 2)


def test_golden_outputs_decide_the_confirmation(bench: Bench):
    bench.activate(2, **wrong_golden(bench.model))
    bench.confirm()
    assert bench.release == 1
    assert bench.slots.rejection("hash-2").reason == "golden"


def test_features_that_are_not_finite_are_an_engine_error(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Engine, "features", lambda self, frame: np.full(16, np.nan, np.float32))
    with pytest.raises(EngineError, match="not finite"):
        bench.serving.model.infer(make_frames(1, 0)[0])


def test_the_first_model_that_fails_leaves_none(tmp_path: Path, tiny_model: TinyModel):
    bench = Bench(tmp_path, tiny_model)
    bench.activate(1)
    bench.serving.revert(bench.serving.model, "engine", "it failed")
    assert bench.serving.model is None
    assert not (bench.root / "current").is_symlink()
    with pytest.raises(ArtifactError, match="no model to go back from"):
        bench.serving.rollback()


def test_a_model_that_does_not_load_is_rejected_before_it_serves(bench: Bench):
    bundle = write_bundle(bench.root.parent, bench.model, release=2)
    entry = bench.slots.stage("hash-2", lambda directory: extract(bundle, directory))
    (bench.slots.directory(entry.slot) / "labels.txt").write_bytes(b"damaged")
    with pytest.raises(ChecksumError):
        bench.serving.activate(entry.slot, "int8")
    assert (bench.release, bench.slots.rejection("hash-2").reason) == (1, "load")


def test_rollback_keeps_the_served_model_when_the_other_is_damaged(bench: Bench):
    bench.activate(2)
    bench.confirm()
    (bench.slots.directory("a") / "labels.txt").write_bytes(b"damaged")
    with pytest.raises(ChecksumError):
        bench.serving.rollback()
    assert (bench.release, bench.slots.serving().release) == (2, 2)


def test_a_restart_serves_the_model_on_probation_again(bench: Bench):
    bench.activate(2)
    slots = Slots(bench.root)
    slots.recover(is_start=True)
    serving = Serving(slots, RUNTIME)
    serving.start()
    assert serving.is_testing
    assert serving.model.manifest.release == 2
    serving.revert(serving.model, "engine", "it failed")  # nothing in memory to go back to: loaded from its slot
    assert serving.model.manifest.release == 1
