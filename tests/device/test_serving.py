"""Probation: a model confirms after its soak, and gives way to the one before at the first error."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from device.backbone import open_backbone
from device.canary import Canary
from device.contract.board import load_board
from device.contract.bundle import extract
from device.contract.errors import ArtifactError, ChecksumError, EngineError, UpdateRefusedError
from device.engine import Engine
from device.probation import MEMORY_LOOK_S, MEMORY_LOOKS, SUSTAINED, WINDOW_FRAMES
from device.serving import CANARY_S, Model, Serving
from device.slots import Slots
from tests.support.tiny_bundle import LABELS, NEW_LABEL, TinyModel, make_frames, write_bundle, wrong_golden

BOARD = load_board("generic-x86-64")
RUNTIME = BOARD.runtime


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
        self.memory = 100 << 20
        self.serving = Serving(self.slots, RUNTIME, budget=BOARD.budget, clock=self.clock, memory=lambda: self.memory)

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
        patch.setattr("device.serving.open_backbone", without_memory)
        serving.start()
    assert serving.model is None
    assert bench.slots.state("a").state == "confirmed"  # the last whole model is kept for the next attempt
    assert bench.slots.rejection("hash-2") is None  # the newer one may be installed again
    serving.start()
    assert serving.model.manifest.release == 1


def test_a_trouble_that_passes_at_once_is_not_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.serving.LOAD_PAUSE_S", 0)
    attempts = iter([without_memory, open_backbone])
    monkeypatch.setattr("device.serving.open_backbone", lambda *args, **keywords: next(attempts)(*args, **keywords))
    serving = Serving(bench.slots, RUNTIME)
    serving.start()
    assert serving.model.manifest.release == 1


def test_a_slot_that_cannot_be_read_is_damaged(bench: Bench):
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    serving = Serving(bench.slots, RUNTIME, verify=fail)
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


def test_a_model_gives_way_also_where_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.activate(2)

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("device.journal._write_all", full)
    bench.serving.revert(bench.serving.model, "engine", "gone wrong")
    assert (bench.release, bench.serving.is_testing) == (1, False)
    assert bench.slots.state("b").state == "testing"  # and is tested again by the next start


@pytest.mark.parametrize("is_confirmed", [False, True])
def test_a_damaged_model_gives_way_at_the_start_also_where_that_cannot_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_confirmed: bool
):
    bench.activate(2)
    if is_confirmed:
        bench.confirm()
    (bench.slots.directory("b") / "labels.txt").write_bytes(b"damaged")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("device.journal._write_all", full)
    serving = Serving(Slots(bench.root), RUNTIME)
    serving.start()
    assert (serving.model.manifest.release, serving.is_testing) == (1, False)
    (bench.slots.directory("a") / "labels.txt").write_bytes(b"damaged")
    serving = Serving(Slots(bench.root), RUNTIME)
    serving.start()
    assert serving.model is None


def test_a_link_that_cannot_be_moved_leaves_journal_and_serving_in_accord(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", full)
        bench.activate(2)
    assert (bench.release, bench.slots.state("b").state, os.readlink(bench.root / "current")) == (
        2,
        "testing",
        "slots/a",
    )
    bench.confirm()
    bench.slots.recover(is_start=True)
    assert os.readlink(bench.root / "current") == "slots/b"


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


def serve_frames(bench: Bench, count: int, latency_ms: float) -> None:
    for _ in range(count):
        bench.serving.count_good_frame(bench.serving.model, latency_s=latency_ms / 1000)
        bench.serving.watch()


def test_a_model_that_stays_too_slow_goes(bench: Bench):
    bench.activate(2)
    serve_frames(bench, WINDOW_FRAMES * SUSTAINED, 2 * BOARD.budget.latency_ms)
    assert (bench.release, bench.slots.state("b").reason) == (1, "budget")
    assert "400.0 ms a frame (p50 of the last 40), 200.0 are allowed" in bench.slots.state("b").detail


def test_a_few_slow_frames_are_forgiven(bench: Bench):
    bench.activate(2)
    serve_frames(bench, WINDOW_FRAMES, 2 * BOARD.budget.latency_ms)
    serve_frames(bench, RUNTIME.soak_frames - WINDOW_FRAMES, BOARD.budget.latency_ms / 2)
    assert bench.slots.fallback().release == bench.release == 2


def test_a_short_soak_is_judged_by_all_its_frames(bench: Bench):
    bench.activate(2)
    serve_frames(bench, 3, 2 * BOARD.budget.latency_ms)
    bench.clock.now += RUNTIME.soak_s
    bench.serving.watch()
    assert (bench.release, bench.slots.state("b").reason) == (1, "budget")


@pytest.mark.parametrize("grows_mb", [BOARD.budget.peak_memory_mb + 1, BOARD.budget.peak_memory_mb - 1])
def test_a_model_that_takes_too_much_memory_goes(bench: Bench, grows_mb: int):
    bench.activate(2)
    bench.memory += grows_mb << 20
    for _ in range(MEMORY_LOOKS):
        bench.clock.now += MEMORY_LOOK_S
        bench.serving.watch()
    is_over = grows_mb > BOARD.budget.peak_memory_mb
    assert (bench.release, bench.slots.state("b").reason) == ((1, "budget") if is_over else (2, ""))


def break_canary(monkeypatch: pytest.MonkeyPatch, is_broken: Callable[[Engine], bool]) -> None:
    """Let some engines compute something else from now on."""
    real = Engine.features
    monkeypatch.setattr(Engine, "features", lambda self, frame: real(self, frame) + (1 if is_broken(self) else 0))


def test_a_model_that_computes_otherwise_while_it_serves_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.activate(2)
    engine = bench.serving.model.engine
    bench.serving.watch()
    break_canary(monkeypatch, lambda other: other is engine)
    bench.clock.now += RUNTIME.soak_s / 2
    bench.serving.watch()
    assert (bench.release, bench.slots.state("b").reason) == (1, "canary")
    assert "golden frame 0 differs" in bench.slots.state("b").detail


def test_all_golden_frames_are_run_within_the_soak(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.activate(2)
    checked: list[int] = []
    monkeypatch.setattr(Canary, "check_next", lambda self: checked.append(self._next))
    for _ in range(99):
        bench.clock.now += RUNTIME.soak_s / 100
        bench.serving.watch()
    assert bench.serving.is_testing
    assert len(checked) >= len(bench.model.golden["frames"])


def test_a_confirmed_model_whose_interpreter_went_wrong_is_loaded_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    engine = bench.serving.model.engine
    break_canary(monkeypatch, lambda other: other is engine)
    bench.clock.now += CANARY_S
    bench.serving.watch()
    assert bench.serving.model.engine is not engine
    assert (bench.release, bench.slots.state("a").state) == (1, "confirmed")
    assert "right after it was loaded anew" in bench.serving.problem
    bench.clock.now += CANARY_S
    bench.serving.watch()
    assert not bench.serving.problem


def test_a_confirmed_model_does_not_give_way_to_a_slot_that_an_update_takes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    bench.activate(2)
    bench.confirm()
    break_canary(monkeypatch, lambda other: other.path.parent.name == "b")

    def check(model: Model) -> None:
        if model.slot == "b":
            raise ArtifactError("wrong")
        bench.slots.discard("a", "the update begins now")

    monkeypatch.setattr(Model, "check_golden", check)
    bench.clock.now += CANARY_S
    bench.serving.watch()
    assert (bench.release, bench.slots.serving().slot) == (2, "b")
    assert "no other model here is right" in bench.serving.problem


@pytest.mark.parametrize("is_older_right", [True, False])
def test_a_confirmed_model_gives_way_only_to_one_that_is_right(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_older_right: bool
):
    bench.activate(2)
    bench.confirm()
    break_canary(monkeypatch, lambda other: not (is_older_right and other.path.parent.name == "a"))
    bench.clock.now += CANARY_S
    bench.serving.watch()
    assert bench.release == (1 if is_older_right else 2)
    assert bench.slots.state("b").reason == ("canary" if is_older_right else "")
    assert ("the model before serves" if is_older_right else "no other model here is right") in bench.serving.problem


def test_a_lesson_on_probation_outlives_it_where_the_model_before_has_the_same_features(bench: Bench):
    bench.activate(2)
    features = np.stack([bench.serving.model.infer(frame)[0] for frame in make_frames(10, 4)])
    bench.serving.model.classifier.learn(features, NEW_LABEL)
    bench.serving.revert(bench.serving.model, "engine", "gone wrong")
    assert bench.release == 1
    assert bench.serving.model.classifier.taught == (NEW_LABEL,)
    bench.serving.model.classifier.learn(features, NEW_LABEL)
    bench.serving = Serving(bench.slots, RUNTIME)
    bench.serving.start()
    assert bench.serving.model.classifier.head.version == 2


@pytest.mark.parametrize("is_rolled_back", [True, False])
def test_a_lesson_while_another_model_is_loaded_is_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_rolled_back: bool
):
    bench.activate(2)
    bench.confirm()
    classifier, load = bench.serving.model.classifier, Model.load
    features = np.stack([bench.serving.model.infer(frame)[0] for frame in make_frames(10, 4)])

    def load_slowly(*arguments: object, **named: object) -> Model:
        model = load(*arguments, **named)
        classifier.learn(features, NEW_LABEL)
        return model

    monkeypatch.setattr(Model, "load", load_slowly)
    if is_rolled_back:
        bench.serving.rollback()
    else:
        engine = bench.serving.model.engine
        break_canary(monkeypatch, lambda other: other is engine)
        bench.clock.now += CANARY_S
        bench.serving.watch()
        assert bench.serving.model.engine is not engine
    assert bench.serving.model.classifier.taught == (NEW_LABEL,)
