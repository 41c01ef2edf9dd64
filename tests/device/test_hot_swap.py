"""Frames go on while the model is replaced: each gets one answer, and the right one."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from device.app import Agent
from device.config import load_config
from device.contract.board import load_board
from device.contract.bundle import extract
from device.contract.errors import EngineError
from device.contract.messages import decode_event, decode_result
from device.engine import Engine
from device.frames import Frame
from device.serving import Serving, attempt
from device.slots import Slots
from tests.support.agent import PREFIX, Field
from tests.support.broker import Listener, listen, mosquitto
from tests.support.tiny_bundle import LABELS, TinyModel, make_frames, write_bundle, write_frames

SWAPS = 8
BOARD = load_board("generic-x86-64")


def activate(serving: Serving, slots: Slots, directory: Path, model: TinyModel, release: int) -> None:
    bundle = write_bundle(directory, model, release=release)
    entry = slots.stage(f"hash-{release}", lambda slot: extract(bundle, slot))
    serving.activate(entry.slot, "int8")


def test_every_answer_is_right_while_models_are_swapped(tmp_path: Path, tiny_model: TinyModel):
    (tmp_path / "root").mkdir()
    slots = Slots(tmp_path / "root")
    serving = Serving(slots, BOARD.runtime)
    activate(serving, slots, tmp_path, tiny_model, 1)
    frames = [make_frames(1, index)[0] for index in range(len(LABELS))]
    answers: Counter[tuple[int, bool]] = Counter()
    stop = threading.Event()

    def classify() -> None:
        while not stop.is_set():
            for index, frame in enumerate(frames):
                model = serving.model
                answers[model.manifest.release, model.infer(frame)[1].label == LABELS[index]] += 1

    thread = threading.Thread(target=classify, name="frames")
    thread.start()
    for release in range(2, SWAPS + 2):
        serving.confirm()
        activate(serving, slots, tmp_path, tiny_model, release)
    stop.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert {is_right for _, is_right in answers} == {True}
    assert len({release for release, _ in answers}) > SWAPS / 2


def test_each_frame_gets_one_result_while_updates_are_installed(field: Field, tmp_path: Path):
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        field.configure(port=port, top="results = true", update="check_interval_s = 0.2")
        with field.agent():
            listener.wait_for("event", is_confirmed(1))
            sent = [*send_until_confirmed(field, listener, 2), *send_until_confirmed(field, listener, 3)]
            listener.wait_for("result", lambda payload: decode_result(payload).frame_id == sent[-1])
    results = [decode_result(payload) for payload in listener.all("result")]
    assert Counter(result.frame_id for result in results) == Counter(sent)
    assert all(result.label == LABELS[int(result.frame_id.split("c")[1][0])] for result in results)


def send_until_confirmed(field: Field, listener: Listener, release: int) -> list[str]:
    """Let frames flow while a release is published and installed; returns their ids, in the order they are read."""
    sent: list[str] = []
    field.publish(release)
    while not any(map(is_confirmed(release), listener.all("event"))):
        for index in range(len(LABELS)):
            prefix = f"{release}-{len(sent):05d}-"
            sent += [path.stem for path in write_frames(field.root / "frames", 1, index, prefix=prefix)]
        time.sleep(0.02)
    return sent


def is_confirmed(release: int) -> Callable[[bytes], bool]:
    def matches(payload: bytes) -> bool:
        event = decode_event(payload)
        return event.kind == "confirmed" and event.data["release"] == release

    return matches


def test_a_frame_on_which_a_new_model_fails_is_answered_by_the_one_before(
    field: Field, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("device.app.forbidden_modules", list)
    agent = Agent(field.root, load_config(field.root), BOARD, stop=threading.Event())
    serving, slots = agent._serving, agent._slots
    activate(serving, slots, field.directory, tiny_model, 1)
    serving.confirm()
    activate(serving, slots, field.directory, tiny_model, 2)
    failing = serving.model
    real = Engine.features

    def features(engine: Engine, frame: object) -> object:
        if engine is failing.engine:
            raise EngineError("the accelerator is gone")
        return real(engine, frame)

    monkeypatch.setattr(Engine, "features", features)
    agent._count(attempt(failing, Frame(frame_id="f", pixels=make_frames(1, 2)[0])))
    assert serving.model.manifest.release == 1
    assert (agent._frames, agent._errors) == (1, 1)
    assert serving.model.ring.get(["f"]).any()
