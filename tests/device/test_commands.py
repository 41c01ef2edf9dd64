"""Commands after a crash and under disk trouble: one honest reply each, and workers that go on."""

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.commands import Commands
from device.contract.commands import ARGUMENTS
from device.contract.errors import LearningError
from device.contract.messages import MAX_PAYLOAD_BYTES, VERBS, Command, Reply, decode_reply, encode_command
from device.spool import Spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool.db", max_bytes=10**6, max_age_s=10**6)


def replies(spool: Spool, count: int) -> dict[str, Reply]:
    deadline = time.monotonic() + 10
    while spool.depth < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return {reply.id: reply for reply in (decode_reply(message.payload) for message in spool.pending(0, 100))}


def command(command_id: str, verb: str = "status") -> bytes:
    return encode_command(Command(id=command_id, verb=verb, expires=time.time() + 60, arguments={}))


def start(spool: Spool, status: Callable[[Any, str], dict[str, Any]], **options: Any) -> Commands:
    commands = Commands(spool, {"status": status}, **options)
    commands.start()
    return commands


def test_what_a_crash_interrupted_is_answered_as_done_only_if_it_is_known(spool: Spool):
    for command_id in ("learned", "unknown"):
        spool.receive_command(command_id, time.time() + 60)
    done = {"learned": {"version": 3}}
    commands = start(spool, lambda *_: {}, was_done=done.get)
    answers = replies(spool, 2)
    assert (answers["learned"].ok, answers["learned"].result) == (True, {"version": 3})
    assert not answers["unknown"].ok
    assert "may have been done" in answers["unknown"].error
    assert "again" not in answers["unknown"].error  # sent again, an example would count twice
    commands.receive(command("learned"))
    assert spool.depth == 2


def test_an_unexpected_error_is_answered_and_the_worker_goes_on(spool: Spool):
    failures = [OSError(28, "No space left on device"), LearningError("refused")]

    def status(_: Any, command_id: str) -> dict[str, Any]:
        if failures:
            raise failures.pop(0)
        return {"id": command_id}

    commands = start(spool, status)
    for command_id in ("a", "b", "c"):
        commands.receive(command(command_id))
    answers = replies(spool, 3)
    assert answers["a"].error == "internal error; see the agent's log"
    assert answers["b"].error == "refused"
    assert answers["c"].result == {"id": "c"}
    assert all(thread.is_alive() for thread in commands.threads)


def test_commands_are_obeyed_and_answered_while_the_disk_is_full(spool: Spool):
    started = threading.Event()
    commands = start(spool, lambda *_: {"ok": started.set()})
    spool._db.execute("PRAGMA query_only = 1")
    commands.receive(command("a"))
    assert replies(spool, 1)["a"].ok


def test_arguments_verbs_and_handlers_are_the_same_everywhere():
    assert set(ARGUMENTS) == set(VERBS)


def test_a_verb_that_the_operator_does_not_want_is_not_obeyed(spool: Spool):
    commands = start(spool, lambda *_: pytest.fail("obeyed"), refused=("status",))
    commands.receive(command("a"))
    assert replies(spool, 1)["a"].error == "status is not allowed on this board; see refused_commands in its agent.toml"


UNREADABLE = [
    b"",
    b"{",
    b"\xff\x00",
    b"[]",
    b"null",
    b'{"id": 7}',
    b'{"id": "a\\nb"}',
    b'{"id": "' + b"x" * 129 + b'"}',
    b"[" * 10**5,
]


def test_what_cannot_be_read_is_answered_once_under_the_hash_of_its_bytes(spool: Spool):
    commands = start(spool, lambda *_: {})
    for _ in range(2):
        for payload in UNREADABLE:
            commands.receive(payload)
    answers = replies(spool, len(UNREADABLE))
    assert set(answers) == {f"unreadable-{hashlib.sha256(payload).hexdigest()[:32]}" for payload in UNREADABLE}
    assert all(reply.error.startswith("command: ") for reply in answers.values())


def test_an_oversized_command_is_answered_under_its_id(spool: Spool):
    commands = start(spool, lambda *_: {})
    commands.receive(b'{"id": "big", "padding": "' + b"x" * MAX_PAYLOAD_BYTES + b'"}')
    assert "over the limit" in replies(spool, 1)["big"].error


@pytest.mark.parametrize("result", [{"image": "x" * MAX_PAYLOAD_BYTES}, {"x": float("nan")}, {"x": {1, 2}}])
def test_a_result_that_cannot_be_sent_is_told(spool: Spool, result):
    commands = start(spool, lambda *_: result)
    commands.receive(command("a"))
    assert "it was done, but its result cannot be sent" in replies(spool, 1)["a"].error


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["ok", "late", "unknown", "odd"]), st.booleans()),
        max_size=12,
    )
)
@settings(max_examples=12, deadline=None)
def test_each_id_is_obeyed_at_most_once_and_answered_once_over_restarts(sent):
    """Whatever comes under an id again, and wherever the agent stops in between."""
    with tempfile.TemporaryDirectory() as directory:
        obeyed: list[str] = []
        spool = Spool(Path(directory, "spool.db"), max_bytes=10**6, max_age_s=10**6)
        commands = start(spool, lambda _, command_id: obeyed.append(command_id) or {})
        for command_id, kind, has_restart in sent:
            verb = "fly" if kind == "unknown" else "status"
            expires = time.time() + (-1 if kind == "late" else 60)
            arguments = {"wings": 2} if kind == "odd" else {}
            commands.receive(encode_command(Command(id=command_id, verb=verb, expires=expires, arguments=arguments)))
            if has_restart:
                settle(commands)
                spool.close()
                spool = Spool(Path(directory, "spool.db"), max_bytes=10**6, max_age_s=10**6)
                commands = start(spool, lambda _, command_id: obeyed.append(command_id) or {})
        settle(commands)
        answered = [decode_reply(message.payload).id for message in spool.pending(0, 100)]
        spool.close()
    assert sorted(answered) == sorted({command_id for command_id, _, _ in sent})
    assert len(obeyed) == len(set(obeyed))


def settle(commands: Commands) -> None:
    for worker in commands.threads:
        done = threading.Event()
        worker.submit(done.set)
        assert done.wait(10)
