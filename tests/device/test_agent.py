"""The agent as a process, with real brokers: what it says, what it obeys, and how it leaves."""

import base64
import errno
import hashlib
import io
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device.app import Agent
from device.config import load_config
from device.contract.board import load_board
from device.contract.commands import SamplingChange
from device.contract.errors import EnrolmentError
from device.contract.messages import (
    Command,
    decode_event,
    decode_reply,
    decode_result,
    decode_state,
    decode_telemetry,
    encode_command,
)
from device.slots import Slots
from device.spool import Spool
from tests.support.agent import PREFIX, Field, wait_for
from tests.support.broker import Listener, amqtt, find_free_port, listen, mosquitto
from tests.support.patience import PATIENCE
from tests.support.tiny_bundle import LABELS, NEW_LABEL, make_frames, write_frames, wrong_golden


def command(verb: str, command_id: str = "c1", *, expires_in_s: float = 60, **arguments: object) -> bytes:
    return encode_command(Command(id=command_id, verb=verb, expires=time.time() + expires_in_s, arguments=arguments))


def is_online(payload: bytes) -> bool:
    return decode_state(payload).status == "online"


def has_model(payload: bytes) -> bool:
    return decode_state(payload).model is not None


def is_event(kind: str) -> Callable[[bytes], bool]:
    return lambda payload: decode_event(payload).kind == kind


def answers(command_id: str) -> Callable[[bytes], bool]:
    return lambda payload: decode_reply(payload).id == command_id


@pytest.mark.parametrize("broker", ["mosquitto", "amqtt"])
def test_a_board_installs_classifies_learns_and_reports(field: Field, tmp_path, broker):
    with amqtt() if broker == "amqtt" else mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        field.configure(port=port, top="results = true")
        with field.agent() as agent:
            birth = decode_state(listener.wait_for("state", has_model))
            assert birth.model.version == "1.0.0"
            assert birth.forbidden_modules == ()
            for kind in ("installed", "confirmed"):
                assert decode_event(listener.wait_for("event", is_event(kind))).data["precision"] == "int8"
            for class_index in range(5):  # of 70 frames, more than `MIN_DRIFT_FRAMES` fall into one of two windows
                write_frames(field.root / "frames", 14, class_index)
            listener.wait_for("result", lambda payload: decode_result(payload).frame_id == "c4-0-0013")
            listener.wait_for("telemetry", lambda payload: "drift" in decode_telemetry(payload).values)

            listener.send(command("learn", label=NEW_LABEL, frame_ids=[f"c4-0-{i:04d}" for i in range(10)]))
            reply = decode_reply(listener.wait_for("reply", answers("c1")))
            assert reply.ok, reply.error
            assert reply.result["version"] == 1
            listener.wait_for("state", lambda payload: decode_state(payload).learned_version == 1)
            write_frames(field.root / "frames", 5, 4, seed=9)
            labels = {decode_result(listener.wait_for("result", is_frame(f"c4-9-{i:04d}"))).label for i in range(5)}
            assert labels == {NEW_LABEL}

            agent.send_signal(signal.SIGTERM)
            assert agent.wait(timeout=10 * PATIENCE) == 0
        assert decode_state(listener.wait_for("state", lambda payload: not is_online(payload))).boot == birth.boot
        require_no_gaps(listener, birth.boot)


def is_frame(frame_id: str) -> Callable[[bytes], bool]:
    return lambda payload: decode_result(payload).frame_id == frame_id


def require_no_gaps(listener, boot: str) -> None:
    messages = [decode_telemetry(payload) for payload in listener.all("telemetry")]
    messages += [decode_event(payload) for payload in listener.all("event")]
    numbers = {message.sequence for message in messages if message.boot == boot}
    assert numbers == set(range(1, max(numbers) + 1))


def test_will_is_published_after_a_kill(field: Field, broker_port):
    field.configure(port=broker_port)
    with listen(broker_port, PREFIX) as listener, field.agent() as agent:
        boot = decode_state(listener.wait_for("state", has_model)).boot
        agent.kill()
        listener.wait_for(
            "state", lambda payload: decode_state(payload).status == "offline" and decode_state(payload).boot == boot
        )


def test_every_command_gets_exactly_one_reply(field: Field, broker_port):
    field.configure(port=broker_port)
    Spool(field.root / "spool.db", max_bytes=10**6, max_age_s=10**6).receive_command("interrupted", time.time() + 60)
    with listen(broker_port, PREFIX) as listener, field.agent() as agent:
        listener.wait_for("event", is_event("confirmed"))
        listener.send(command("status", "again"))
        listener.send(command("status", "again"))
        listener.send(command("status", "late", expires_in_s=-1))
        listener.send(command("fly", "unknown"))
        listener.send(command("learn", "odd", wings=2))
        listener.send(b'{"id": "future", "schema": 2}')
        listener.send(b"no JSON")
        listener.send(command("rollback", "last"))
        no_json = f"unreadable-{hashlib.sha256(b'no JSON').hexdigest()[:32]}"
        wanted = ["interrupted", "again", "late", "unknown", "odd", "future", "last", no_json]
        replies = {name: decode_reply(listener.wait_for("reply", answers(name))) for name in wanted}
        agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=10 * PATIENCE)
        assert sorted(decode_reply(payload).id for payload in listener.all("reply")) == sorted(wanted)
    assert replies["again"].result["modules_ok"] is True
    errors = {name: reply.error for name, reply in replies.items() if not reply.ok}
    assert "the agent stopped" in errors["interrupted"]
    assert "expired" in errors["late"]
    assert "verbs are diagnostics, learn, rebirth" in errors["unknown"]
    assert "not JSON" in errors[no_json]
    assert "unknown key 'wings'" in errors["odd"]
    assert "schema" in errors["future"]
    assert "no earlier confirmed model" in errors["last"]
    assert not any("\n" in error for error in errors.values())


def ask(listener, verb: str, command_id: str, **arguments: object):
    listener.send(command(verb, command_id, **arguments))
    return decode_reply(listener.wait_for("reply", answers(command_id)))


def test_a_lesson_is_taken_back_and_sampling_is_kept_over_a_restart(field: Field, broker_port):
    field.configure(port=broker_port)
    with listen(broker_port, PREFIX) as listener, field.agent() as agent:
        listener.wait_for("event", is_event("confirmed"))
        write_frames(field.root / "frames", 10, 4)
        listener.wait_for("telemetry", lambda payload: decode_telemetry(payload).values.get("frames", 0) > 0)
        frames = [f"c4-0-{i:04d}" for i in range(10)]
        assert ask(listener, "learn", "lesson", label=NEW_LABEL, frame_ids=frames).ok
        reply = ask(listener, "undo", "back", lesson="lesson")
        assert (reply.ok, reply.result["label"], reply.result["classes"]) == (True, NEW_LABEL, 4)
        event = decode_event(listener.wait_for("event", is_event("unlearned")))
        assert (event.data["reason"], event.data["lesson"]) == ("undo", "lesson")
        assert "no lesson is here to be taken back" in ask(listener, "undo", "back-2").error

        assert (
            "telemetry_interval_s must be 1..86400"
            in ask(listener, "set-sampling", "s1", telemetry_interval_s=0.1).error
        )
        assert ask(listener, "set-sampling", "s2", results=True, max_fps=100).result["sampling"] == {
            "max_fps": 100.0,
            "telemetry_interval_s": 0.5,
            "results": True,
        }
        write_frames(field.root / "frames", 1, 0, seed=3)
        listener.wait_for("result")
        agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=10 * PATIENCE)
    with listen(broker_port, PREFIX) as listener, field.agent():
        status = ask(listener, "status", "st")
        assert status.result["sampling"]["results"] is True
        assert status.result["labels"] == list(LABELS)
        assert ask(listener, "set-sampling", "s3", reset=True).result["sampling"]["results"] is False


def test_an_image_leaves_the_board_only_where_its_operator_allows_it(field: Field, broker_port):
    field.configure(port=broker_port)
    with listen(broker_port, PREFIX) as listener, field.agent():
        listener.wait_for("event", is_event("confirmed"))
        write_frames(field.root / "frames", 1, 0)
        assert "snapshot = true in agent.toml" in ask(listener, "snapshot", "off").error
    field.configure(port=broker_port, top='snapshot = true\nrefused_commands = ["learn"]')
    with listen(broker_port, PREFIX) as listener, field.agent():
        listener.wait_for("telemetry", lambda payload: decode_telemetry(payload).values.get("frames", 0) > 0)
        reply = ask(listener, "snapshot", "on")
        assert reply.ok, reply.error
        image = Image.open(io.BytesIO(base64.b64decode(reply.result["image"])))
        assert (image.size, image.mode, reply.result["frame_id"]) == ((8, 8), "L", "c0-0-0000")
        assert np.array_equal(np.asarray(image), make_frames(1, 0)[0, :, :, 0])
        assert "not allowed on this board" in ask(listener, "learn", "no", label="x", frame_ids=["c0-0-0000"]).error
        report = ask(listener, "diagnostics", "d").result
        assert report["protocol"] == "MQTT 5"
        assert {"mqtt", "commands", "updates"} <= set(report["threads"])
        assert {"python", "numpy", "paho-mqtt", "openssl"} <= report["versions"].keys()
        born = len(listener.all("state"))
        assert ask(listener, "rebirth", "r").ok
        wait_for(lambda: len(listener.all("state")) > born)


def test_messages_wait_while_the_broker_is_away(field: Field, tmp_path):
    port = find_free_port()
    field.configure(port=port)
    with mosquitto(tmp_path, port), listen(port, PREFIX, "listener"):
        pass  # from now on, the broker keeps for the listener what comes before it is back
    with field.agent() as agent:
        wait_for_log(field, "event confirmed")
        with mosquitto(tmp_path, port), listen(port, PREFIX, "listener") as listener:
            boot = decode_state(listener.wait_for("state", is_online)).boot
            listener.wait_for("event", is_event("confirmed"))
            agent.send_signal(signal.SIGTERM)
            agent.wait(timeout=10 * PATIENCE)
            require_no_gaps(listener, boot)


def test_commands_update_refuse_and_roll_back(field: Field, broker_port):
    field.configure(port=broker_port)
    with listen(broker_port, PREFIX) as listener, field.agent():
        listener.wait_for("event", is_event("confirmed"))
        field.publish(2, channel="canary")
        listener.send(command("update", "u1", channel="../canary"))
        assert "is no name" in decode_reply(listener.wait_for("reply", answers("u1"))).error
        listener.send(command("update", "u2", channel="canary"))
        reply = decode_reply(listener.wait_for("reply", answers("u2")))
        assert reply.ok, reply.error
        assert (reply.result["state"], reply.result["slot"], reply.result["version"]) == ("testing", "b", "2.0.0")
        listener.wait_for(
            "event",
            lambda payload: decode_event(payload).kind == "confirmed" and decode_event(payload).data["release"] == 2,
        )

        field.publish(3, files=wrong_golden(field.model))
        listener.send(command("update", "u3"))
        assert "golden features differ" in decode_reply(listener.wait_for("reply", answers("u3"))).error
        assert decode_event(listener.wait_for("event", is_event("refused"))).data["reason"] == "selftest"
        listener.send(command("update", "u4"))
        assert "rejected here before" in decode_reply(listener.wait_for("reply", answers("u4"))).error

        listener.send(command("rollback", "r1"))
        assert (
            "no earlier confirmed model" in decode_reply(listener.wait_for("reply", answers("r1"))).error
        )  # slot a took release 3


def test_rollback_goes_back_and_stays_back(field: Field, broker_port):
    field.configure(port=broker_port, update="check_interval_s = 0.2")
    with listen(broker_port, PREFIX) as listener, field.agent():
        listener.wait_for("event", is_event("confirmed"))
        field.publish(2)
        listener.wait_for(
            "event",
            lambda payload: decode_event(payload).kind == "confirmed" and decode_event(payload).data["release"] == 2,
        )
        listener.send(command("rollback", "r1"))
        assert decode_reply(listener.wait_for("reply", answers("r1"))).result["version"] == "1.0.0"
        assert decode_event(listener.wait_for("event", is_event("rolled-back"))).data["reason"] == "rolled-back"
        refused = decode_event(listener.wait_for("event", is_event("refused")))
        assert refused.data["reason"] == "rejected-before"
        time.sleep(1)
        assert (
            len([payload for payload in listener.all("event") if is_event("refused")(payload)]) == 1
        )  # said once, not at each look


def test_a_second_agent_gets_one_clear_line(field: Field):
    with field.agent() as agent:
        wait_for_log(field, "event confirmed")
        for verb in (["run"], ["update", "--force"], ["rollback"]):
            second = field.cli(*verb)
            assert second.returncode == 10
            assert f"is in use by 'fieldvit-device run' (process {agent.pid})" in second.stderr
            assert len(second.stderr.strip().splitlines()) == 1
        status = json.loads(field.cli("status", "--json").stdout)
        assert status["running"] is True
        assert status["version"] == "1.0.0"
        assert status["modules_ok"] is True
        assert set(status["modules"]).isdisjoint({"torch", "tensorflow", "host", "converters"})


def test_update_asks_the_agent_that_runs(field: Field):
    field.cli("update")
    with field.agent() as agent:
        wait_for(lambda: "frame" in field.cli("status").stdout)
        assert json.loads(field.cli("update", "--json").stdout)["updated"] is False
        field.publish(2)
        result = field.cli("update")
        assert re.match(r"tiny 2\.0\.0 \w+ in slot b: installed and confirmed", result.stdout)
        assert f"the agent (process {agent.pid}) looks for an update" in result.stderr
        field.publish(3, files=wrong_golden(field.model))
        result = field.cli("update")
        assert result.returncode == 5
        assert "golden features differ" in result.stderr
    assert Slots(field.root).serving().release == 2


def test_update_says_why_the_agent_took_a_model_back(field: Field):
    field.cli("update")
    field.publish(2)
    field.configure(runtime="soak_s = 2")
    with field.agent():
        wait_for(lambda: "frame" in field.cli("status").stdout)
        asking = field.start("update")
        wait_for(lambda: Slots(field.root).serving().release == 2)
        for number in itertools.takewhile(lambda _: asking.poll() is None, range(100)):
            # the journal names a model just before it serves: the first frames may still be of the one before
            write_color_frame(field.root / "frames", f"color-{number}")
            time.sleep(0.2)
        _, errors = asking.communicate(timeout=20 * PATIENCE)
    assert asking.returncode == 5
    assert re.search(rb"error: tiny 2.0.0 was taken back \(frames\): not one of \d+ frames could be used", errors)


def write_color_frame(directory: Path, name: str) -> None:
    """A frame that no gray model can use, renamed into place."""
    part = directory / f"{name}.part"
    part.write_bytes(b"P6 8 8 255\n" + bytes(8 * 8 * 3))
    part.rename(directory / f"{name}.ppm")


def frames_reported(listener: Listener) -> float:
    """In all windows: a busy machine may read what lies there in two of them."""
    return sum(decode_telemetry(payload).values["frames"] for payload in listener.all("telemetry"))


def test_learned_classes_survive_a_restart_and_damage_is_reported(field: Field, broker_port):
    field.configure(port=broker_port)
    write_frames(field.root / "frames", 10, 4)
    with listen(broker_port, PREFIX) as listener:
        with field.agent() as agent:
            listener.wait_for("telemetry", lambda _: frames_reported(listener) == 10)
            ids = [f"c4-0-{i:04d}" for i in range(10)]
            for number in (1, 2):
                listener.send(
                    command("learn", f"l{number}", label=NEW_LABEL, frame_ids=ids[5 * number - 5 : 5 * number])
                )
                assert decode_reply(listener.wait_for("reply", answers(f"l{number}"))).ok
            agent.kill()
        result = json.loads(field.cli("infer", field.root / "frames", "--json").stdout)
        assert result["learned_version"] == 2
        assert {answer["label"] for answer in result["results"]} == {NEW_LABEL}
        (state,) = (field.root / "state").glob("*.npz")
        state.write_bytes(state.read_bytes()[:-100])
        with field.agent():
            event = decode_event(listener.wait_for("event", is_event("unlearned")))
            assert "learned state not used" in event.data["detail"]
            listener.wait_for(
                "state",
                lambda payload: decode_state(payload).learned_version == 1 and decode_state(payload).boot == event.boot,
            )


def test_a_damaged_board_installs_its_model_again(field: Field):
    field.cli("update")
    (field.root / "slots" / "a" / "labels.txt").write_bytes(b"damaged")
    with field.agent():
        wait_for(lambda: Slots(field.root).last_number > 4 and Slots(field.root).state("a").state == "confirmed")
    assert [entry.reason for entry in Slots(field.root).history() if entry.state == "rejected"] == ["load"]


def test_a_newer_model_that_was_damaged_comes_back(field: Field):
    field.cli("update")
    field.publish(2)
    field.cli("update")
    (field.root / "slots" / "b" / "labels.txt").write_bytes(b"damaged")
    with field.agent():
        wait_for(lambda: Slots(field.root).last_number > 8 and Slots(field.root).state("b").state == "confirmed")
    assert Slots(field.root).serving().release == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_the_whole_group_in_an_update_rejects_nothing(field: Field, number: signal.Signals):
    field.cli("update")
    field.publish(2)
    field.configure(update="check_interval_s = 0.05")
    with field.agent() as agent:
        wait_for(lambda: Slots(field.root).state("b").state == "staged")
        time.sleep(0.1)  # the self-test is under way
        os.killpg(agent.pid, number)
        assert agent.wait(timeout=10 * PATIENCE) == 0
    assert "Traceback" not in field.log
    assert {entry.state for entry in Slots(field.root).history()}.isdisjoint({"rejected"})
    with field.agent():
        wait_for(lambda: Slots(field.root).serving().release == 2)
    assert Slots(field.root).serving().precision == "int8"


def test_a_model_that_can_use_no_frame_gives_way(field: Field):
    field.cli("update")
    field.publish(2)
    field.configure(update="check_interval_s = 0.1")
    with field.agent():
        wait_for(lambda: "event installed: {'slot': 'b'" in field.log)  # the link is switched a moment before the model
        (field.root / "frames" / "color.part").write_bytes(b"P6 8 8 255\n" + bytes(8 * 8 * 3))
        (field.root / "frames" / "color.part").rename(field.root / "frames" / "color.ppm")
        wait_for(lambda: Slots(field.root).state("b").state == "rejected")
    entry = Slots(field.root).state("b")
    assert entry.reason == "frames"
    assert "not one of 1 frames could be used: color" in entry.detail
    assert Slots(field.root).serving().release == 1


@pytest.fixture
def idle_agent(field: Field, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent in this process, which does not run."""
    monkeypatch.setattr("device.app.forbidden_modules", list)
    config = load_config(field.root)
    return Agent(field.root, config, load_board(config.board), stop=threading.Event())


def test_only_one_look_for_updates_waits(idle_agent: Agent, monkeypatch: pytest.MonkeyPatch):
    jobs: list[Callable[[], None]] = []
    monkeypatch.setattr(idle_agent._commands.updates, "submit", lambda job: not jobs.append(job))
    for _ in range(3):
        idle_agent._check_for_update()
    assert len(jobs) == 1
    monkeypatch.setattr(idle_agent._verbs, "check_for_update", lambda: None)
    jobs[0]()
    idle_agent._check_for_update()
    assert len(jobs) == 2


def test_a_look_that_finds_no_room_in_the_queue_is_asked_for_again(idle_agent: Agent):
    asked: list[Callable[[], None]] = []

    def full(job: Callable[[], None]) -> bool:
        asked.append(job)
        return False

    idle_agent._verbs.request_check(full)
    idle_agent._verbs.request_check(full)
    assert len(asked) == 2


def test_heat_is_reported_once_per_crossing(idle_agent: Agent, field: Field, monkeypatch: pytest.MonkeyPatch):
    events: list[dict[str, object]] = []
    monkeypatch.setattr(idle_agent._reporter, "event", lambda kind, **data: events.append({"kind": kind, **data}))
    limit = load_board("generic-x86-64").budget.soc_temp_celsius
    for celsius in (limit, limit + 1, limit + 2, None, limit + 3):
        monkeypatch.setattr("device.reporter.soc_temp_celsius", lambda celsius=celsius: celsius)
        idle_agent._report_window(None)
    assert [(event["kind"], event["reason"]) for event in events] == [("error", "temperature")] * 2
    assert f"has {limit + 1:.0f} °C, its limit is {limit:.0f} °C" in events[0]["detail"]


def test_a_model_that_could_not_be_loaded_is_tried_again(idle_agent: Agent, monkeypatch: pytest.MonkeyPatch):
    starts: list[str] = []
    monkeypatch.setattr(idle_agent._serving, "start", lambda: starts.append("start"))
    monkeypatch.setattr(idle_agent, "_dead_threads", list)
    idle_agent._tick()
    assert not starts
    idle_agent._next_load = 0
    idle_agent._tick()
    idle_agent._tick()
    assert len(starts) == 1


def test_a_slow_pace_is_no_hang_and_can_be_changed_meanwhile(idle_agent: Agent, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idle_agent, "_dead_threads", list)
    beats: list[float] = []
    monkeypatch.setattr(idle_agent._pulse, "beat", lambda: beats.append(0))
    idle_agent._sampling.change(SamplingChange(max_fps=0.01))
    pacing = threading.Thread(target=idle_agent._pace, daemon=True)
    pacing.start()
    wait_for(lambda: len(beats) > 1)
    assert pacing.is_alive()
    idle_agent._sampling.change(SamplingChange(max_fps=100.0))
    pacing.join(5 * PATIENCE)
    assert not pacing.is_alive()


def test_a_disk_that_takes_nothing_does_not_stop_inference(
    field: Field, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    slots = Slots(field.root)
    slots._record(slots.state("a"), "staged")  # what a power cut may leave
    monkeypatch.setattr("device.journal._write_all", full)
    monkeypatch.setattr("device.app.forbidden_modules", list)
    config = load_config(field.root)
    Agent(field.root, config, load_board(config.board), stop=threading.Event())._report_recovery()
    assert "cannot be put in order" in caplog.text


def test_a_transfer_that_goes_on_is_no_hang(idle_agent: Agent, field: Field):
    updates = idle_agent._commands.updates
    updates._busy_since = time.monotonic() - 10_000
    assert updates.busy_s() >= 10_000
    assert idle_agent._verbs._updater.preview(field.directory / "repo")
    assert updates.busy_s() < 1000


def test_an_agent_whose_frame_loop_fails_can_still_be_reached(idle_agent: Agent, monkeypatch: pytest.MonkeyPatch):
    connects: list[str] = []
    monkeypatch.setattr(idle_agent, "_connect", lambda: connects.append("connect"))
    monkeypatch.setattr(idle_agent, "_tick", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        idle_agent._step()
    assert connects


def wait_for_log(field: Field, text: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s * PATIENCE
    while text not in field.log:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{text!r} not in the agent's log:\n{field.log}")
        time.sleep(0.05)


def test_a_certificate_that_cannot_be_renewed_is_reported_once(idle_agent: Agent, monkeypatch: pytest.MonkeyPatch):
    outcomes = [EnrolmentError("down"), EnrolmentError("down"), None, EnrolmentError("down again")]

    def renew(_: object) -> None:
        if outcome := outcomes.pop(0):
            raise outcome

    monkeypatch.setattr("device.identity.renew_if_due", renew)
    for _ in range(4):
        idle_agent._renew_certificate()
    events = [decode_event(message.payload) for message in idle_agent._spool.pending(0, 9)]
    assert [event.data for event in events] == [
        {"reason": "certificate", "detail": "down"},
        {"reason": "certificate", "detail": "down again"},
    ]
