"""Commands after a crash and under disk trouble: one honest reply each, and workers that go on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device.commands import Commands
from device.contract.errors import LearningError
from device.contract.messages import Command, Reply, decode_reply, encode_command
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
