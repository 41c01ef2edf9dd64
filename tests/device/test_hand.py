"""Hand tools for what was learned, with the agent running and without; updates that would lose it, on a real agent."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from device.ask import ASK_DIRECTORY, Asked, ask, read_attachment
from device.cli import main
from device.contract.errors import AgentBusyError, ArtifactError, DeviceError
from device.contract.manifest import ProjectorEntry
from device.contract.messages import Command, Reply, decode_event, decode_state, encode_command
from device.slots import Slots
from tests.device.test_agent import answers, command, has_model, is_event
from tests.device.test_agent import ask as send
from tests.device.test_cli import require_one_error_line
from tests.support.agent import PREFIX, Field, wait_for
from tests.support.broker import listen
from tests.support.tiny_bundle import LABELS, NEW_LABEL, TinyModel, with_projector, write_frames

Way = tuple[ProjectorEntry, bytes]


def shown(field: Field, *words: str | Path) -> dict:
    result = field.cli(*words, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def is_served(field: Field, release: int) -> bool:
    entry = Slots(field.root).serving()
    return entry is not None and (entry.release, entry.state) == (release, "confirmed")


@pytest.mark.parametrize("is_running", [False, True])
def test_teach_undo_back_up_and_restore_by_hand(field: Field, is_running: bool):
    field.cli("update")
    photos, backup = field.directory / "photos", field.directory / "backup.learned"
    write_frames(photos, 10, 4)
    if is_running:
        with field.agent() as agent:
            wait_for(lambda: "pid" in agent_table(field))
            teach_undo_back_up_and_restore(field, photos, backup)
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(timeout=10) == 0
    else:
        teach_undo_back_up_and_restore(field, photos, backup)
        assert not list((field.root / ASK_DIRECTORY).glob("*"))
    assert shown(field, "infer", photos)["results"][0]["label"] == NEW_LABEL


def teach_undo_back_up_and_restore(field: Field, photos: Path, backup: Path) -> None:
    done = shown(field, "learn", NEW_LABEL, photos)
    assert (done["examples"], done["classes"], done["version"]) == (10, 5, 1)
    assert shown(field, "learned", "export", backup)["taught"] == [NEW_LABEL]
    assert backup.stat().st_mode & 0o777 == 0o600
    listed = shown(field, "learned", "list")
    assert [k["label"] for k in listed["lessons"]] == [NEW_LABEL]
    assert shown(field, "undo", listed["lessons"][0]["id"])["classes"] == 4
    restored = shown(field, "learned", "import", backup)
    assert (restored["labels"], restored["version"]) == ([NEW_LABEL], 3)
    damaged = field.directory / "damaged.learned"
    damaged.write_bytes(backup.read_bytes()[:-1])
    exit_code = field.cli("learned", "import", damaged)
    assert exit_code.returncode
    assert "is damaged" in exit_code.stderr
    assert shown(field, "learned", "list")["version"] == 3


def agent_table(field: Field) -> dict:
    path = field.root / "agent.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def test_hand_tools_say_what_is_missing(field: Field):
    require_one_error_line(field.cli("learned", "list"), 3, "no model is installed")
    field.cli("update")
    require_one_error_line(field.cli("learn", NEW_LABEL), 2, "name either files, or with --id frames")
    require_one_error_line(field.cli("learned", "export"), 2, "name a file")
    require_one_error_line(field.cli("learned", "export", field.directory / "x"), 3, "nothing was learned")
    require_one_error_line(field.cli("undo"), 7, "no lesson is here to be taken back")
    require_one_error_line(field.cli("learned", "import", field.directory / "none"), 3, "none: cannot be read")
    other = field.root / "agent.toml"
    require_one_error_line(field.cli("learned", "import", other), 3, "agent.toml: is no backup of learned state")
    require_one_error_line(field.cli("learned", "import", "/dev/zero"), 3, "/dev/zero: is no backup of learned state")


def test_options_may_stand_among_the_words_of_a_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Plain argparse says of the files: unrecognized arguments."""
    assert main(["learn", "ripe", "--root", str(tmp_path), "photos", "more"]) == 2
    assert "agent.toml: no such file" in capsys.readouterr().err
    assert main(["learned", "export", "--root", str(tmp_path), "backup.learned"]) == 2
    assert "agent.toml: no such file" in capsys.readouterr().err


def test_no_more_is_read_of_what_lies_beside_a_request_than_there_may_be(tmp_path: Path):
    assert len(read_attachment(Path("/dev/zero"), 1000)) == 1001
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_attachment(tmp_path / "none", 1000)


def test_an_update_that_would_lose_a_class_waits_for_a_decision(field: Field, other_model: TinyModel, broker_port: int):
    field.configure(port=broker_port)
    write_frames(field.directory / "photos", 10, 4)
    with listen(broker_port, PREFIX) as listener, field.agent() as agent:
        listener.wait_for("event", is_event("confirmed"))
        shown(field, "learn", NEW_LABEL, field.directory / "photos")
        listener.wait_for("state", lambda payload: decode_state(payload).labels == (*LABELS, NEW_LABEL))
        field.publish(2, model=other_model)
        preview = shown(field, "update", "--dry-run")
        assert (preview["offered"]["release"], preview["learned"]["dropped"]) == (2, [NEW_LABEL])
        assert send(listener, "update", "dry", dry_run=True).result == preview
        reply = send(listener, "update", "u1")
        assert not reply.ok
        assert "would drop 'center', taught on this board" in reply.error
        assert decode_event(listener.wait_for("event", is_event("refused"))).data["reason"] == "learned-loss"
        status = shown(field, "status")
        assert (status["release"], status["taught"]) == (1, [NEW_LABEL])
        assert status["last_check"]["reason"] == "learned-loss"
        downloads = field.log.count("bytes were transferred")
        assert downloads
        require_one_error_line(field.cli("update"), 5, "would drop 'center'")
        assert field.log.count("bytes were transferred") == downloads  # it is not fetched again for the same answer
        assert "installed and confirmed" in field.cli("update", "--accept-loss").stdout
        event = decode_event(listener.wait_for("event", is_event("unlearned")))
        assert (event.data["reason"], event.data["labels"]) == ("dropped", [NEW_LABEL])
        assert send(listener, "rollback", "r1").ok
        listener.wait_for("state", lambda payload: decode_state(payload).labels == (*LABELS, NEW_LABEL))
        agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=10)


def test_an_update_with_a_projector_moves_the_class_by_itself(
    field: Field, other_model: TinyModel, projector: Way, broker_port: int
):
    field.configure(port=broker_port, update="check_interval_s = 0.2")
    write_frames(field.directory / "photos", 10, 4)
    with listen(broker_port, PREFIX) as listener, field.agent() as agent:
        listener.wait_for("state", has_model)
        wait_for(lambda: is_served(field, 1))
        shown(field, "learn", NEW_LABEL, field.directory / "photos")
        field.publish(2, model=other_model, **with_projector(*projector))
        event = decode_event(listener.wait_for("event", is_event("migrated"), timeout_s=60))
        assert (event.data["labels"], event.data["version"], event.data["left"]) == ([NEW_LABEL], 2, {})
        assert event.data["old_before"] - event.data["old_after"] <= 0.05
        assert event.data["taught_after"] >= 0.5
        wait_for(lambda: is_served(field, 2))
        assert shown(field, "infer", field.directory / "photos")["results"][0]["label"] == NEW_LABEL
        agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=10)


@pytest.mark.parametrize("policy", ["refuse", "drop"])
def test_the_configuration_decides_where_nobody_is_asked(field: Field, other_model: TinyModel, policy: str):
    field.configure(update=f'on_learned_loss = "{policy}"')
    field.cli("update")
    write_frames(field.directory / "photos", 10, 4)
    shown(field, "learn", NEW_LABEL, field.directory / "photos")
    field.publish(2, model=other_model)
    result = field.cli("update")
    assert (result.returncode, is_served(field, 2)) == ((5, False) if policy == "refuse" else (0, True))
    if policy == "refuse":
        require_one_error_line(result, 5, "would drop 'center'", "on_learned_loss")


def test_features_of_another_backbone_are_not_learned(field: Field, broker_port: int):
    field.configure(port=broker_port)
    with listen(broker_port, PREFIX) as listener, field.agent():
        listener.wait_for("event", is_event("confirmed"))
        reply = send(listener, "learn", "l1", label="x", features=[[0.0] * 16], backbone="f" * 64)
        assert "another backbone" in reply.error
        listener.send(command("restore", "r1"))
        listener.wait_for("reply", answers("r1"))
        assert "verb 'restore' is unknown" in send(listener, "restore", "r2").error


# the directory of requests


def test_requests_are_taken_once_and_what_is_odd_is_left_aside(tmp_path: Path):
    taken: list[str] = []
    asked = Asked(tmp_path, lambda command, answer: taken.append(command.verb) or answer(Reply(id=command.id, ok=True)))
    directory = tmp_path / ASK_DIRECTORY
    assert directory.stat().st_mode & 0o777 == 0o700
    good = Command(id="a" * 32, verb="undo", expires=time.time() + 60)
    contents = {
        "a" * 32: encode_command(good),
        "b" * 32: encode_command(good),  # another's id
        "../x": b"",
        "c" * 32: b"no JSON",
        "odd": encode_command(Command(id="odd", verb="undo", expires=0)),
    }
    for name, content in contents.items():
        (directory / f"{name.replace('/', '_')}.ask").write_bytes(content)
    for _ in range(2):
        asked.poll()
    assert taken == ["undo"]
    assert [path.name for path in directory.iterdir()] == [f"{'a' * 32}.answer"]


def test_what_lies_there_at_a_start_is_from_before(tmp_path: Path):
    (tmp_path / ASK_DIRECTORY).mkdir()
    (tmp_path / ASK_DIRECTORY / f"{'a' * 32}.ask").write_bytes(b"{}")
    Asked(tmp_path, lambda *_: pytest.fail("obeyed")).poll()
    assert not list((tmp_path / ASK_DIRECTORY).iterdir())


def test_an_agent_that_takes_nothing_or_belongs_to_another_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DeviceError, match="takes no requests"):
        ask(tmp_path, os.getpid(), "undo", {})
    (tmp_path / ASK_DIRECTORY).mkdir()
    monkeypatch.setattr("device.ask.EXPIRES_S", 0.1)
    with pytest.raises(DeviceError, match="gave no verdict in time"):
        ask(tmp_path, os.getpid(), "undo", {})
    assert not list((tmp_path / ASK_DIRECTORY).iterdir())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("device.ask.write_atomic", refuse)
    with pytest.raises(AgentBusyError, match="runs as another user"):
        ask(tmp_path, os.getpid(), "undo", {})
