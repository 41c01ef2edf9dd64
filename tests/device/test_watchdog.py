"""A hang is noticed, told to the supervisor by silence, and ends the process where nobody else does."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from device.last_run import begin_run, end_run, last_crash
from device.notify import Notifier, Supervisor
from device.slots import Slots
from device.watchdog import HANG_EXIT_CODE, Heart, Pulse, Watchdog
from tests.support.agent import REPO_ROOT, Field, wait_for
from tests.support.notify import notify_socket
from tests.support.patience import PATIENCE


def is_ready(message: dict[str, str]) -> bool:
    return message.get("READY") == "1"


def is_beat(message: dict[str, str]) -> bool:
    return message.get("WATCHDOG") == "1"


def watch(silence_s: float, **options: object) -> tuple[list[str], list[int]]:
    """Watch one heart for a moment; returns which hung, and the exit codes asked for."""
    hung: list[str] = []
    ended: list[int] = []
    options = {"notifier": Notifier(), "supervisor_s": 0.0} | options
    heart = Heart(silence_s=lambda: silence_s, limit_s=0.2)
    watchdog = Watchdog({"it": heart}, on_hang=lambda name, _: hung.append(name), end=ended.append, **options)
    watchdog.start()
    time.sleep(0.3)
    watchdog.stop()
    return hung, ended


def test_a_hang_ends_the_process_where_nobody_else_does(capfd: pytest.CaptureFixture[str]):
    assert watch(0.1) == ([], [])
    assert watch(0.3) == (["it"], [HANG_EXIT_CODE])
    assert "thread" in capfd.readouterr().err.lower()


def test_a_supervisor_is_left_to_end_it_and_hears_nothing_more(tmp_path: Path):
    with notify_socket(tmp_path) as supervisor:
        assert watch(0.3, notifier=Notifier(str(supervisor.path)), supervisor_s=10.0) == (["it"], [])
        assert supervisor.wait_for(lambda message: True) == {"STATUS": "it hangs"}


def test_a_pulse_has_grace():
    clock = [0.0]
    pulse = Pulse(lambda: clock[0])
    clock[0] = 7.0
    assert pulse.silence_s() == 7
    pulse.beat(grace_s=5)
    assert pulse.silence_s() == 0
    clock[0] = 14.0
    assert pulse.silence_s() == 2


def test_an_interpreter_that_is_frozen_ends_too():
    script = """
import ctypes, device.watchdog as w
from device.notify import Notifier
w.FROZEN_S = 0.5
w.Watchdog({"it": w.Heart(silence_s=lambda: 0.0, limit_s=0.1)}, notifier=Notifier(), supervisor_s=0, on_hang=print).start()
ctypes.PyDLL(None).sleep(20)  # holds the interpreter's lock
"""
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True, timeout=20 * PATIENCE
    )
    assert result.returncode == 1
    assert "Timeout" in result.stderr
    assert time.monotonic() - started < 10


def test_what_the_environment_says_of_the_supervisor(tmp_path: Path):
    assert Supervisor.from_environment({}).watchdog_s == 0
    given = {"NOTIFY_SOCKET": str(tmp_path / "s"), "WATCHDOG_USEC": "1500000"}
    assert Supervisor.from_environment(given).watchdog_s == 1.5
    assert Supervisor.from_environment(given | {"WATCHDOG_PID": "1"}).watchdog_s == 0
    assert Supervisor.from_environment(given | {"WATCHDOG_USEC": "soon"}).watchdog_s == 0


def test_an_abstract_socket_and_none_at_all(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0fieldvit-test-notify")
        Notifier("@fieldvit-test-notify").ready("two\nlines")
        assert receiver.recv(100) == b"READY=1\nSTATUS=two lines"
    silent = Notifier(str(tmp_path / "nobody"))
    silent.status("x")
    silent.status("y")
    assert len(caplog.records) == 1


def test_the_agent_tells_the_supervisor_how_it_is(field: Field, tmp_path: Path):
    field.cli("update")
    with notify_socket(tmp_path) as told, field.agent(environment=told.environment(watchdog_s=1.0)) as agent:
        assert re.match(r"tiny 1\.0\.0 \w+, confirmed; ", told.wait_for(is_ready)["STATUS"])
        told.wait_for(is_beat, timeout_s=1)
        field.publish(2)
        agent.send_signal(signal.SIGHUP)
        told.wait_for(lambda message: "RELOADING" in message and "MONOTONIC_USEC" in message)
        told.wait_for(is_ready)
        wait_for(lambda: Slots(field.root).fallback().release == 2)
        agent.send_signal(signal.SIGTERM)
        told.wait_for(lambda message: message.get("STOPPING") == "1")
        assert agent.wait(timeout=10 * PATIENCE) == 0
    assert not (field.root / "running").exists()


def test_without_a_supervisor_the_agent_ends_itself_and_the_model_on_probation_goes(field: Field):
    field.cli("update")
    field.publish(2)
    field.configure(top="", update="check_interval_s = 0.1", runtime="soak_s = 1000\nsoak_frames = 1000")
    with (field.root / "agent.toml").open("a") as config:
        config.write("\n[watchdog]\nframes_s = 1\n")
    site = field.directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HANGING)
    with field.agent(environment=environment_with(site)) as agent:
        wait_for(lambda: Slots(field.root).serving().release == 2)
        (field.root / "hang").touch()
        assert agent.wait(timeout=10 * PATIENCE) == HANG_EXIT_CODE
    entry = Slots(field.root).state("b")
    assert (entry.state, entry.reason) == ("rejected", "hang")
    assert "the frame loop gave no sign of life for" in entry.detail
    assert "the frame loop gave no sign of life for" in last_crash(field.root)
    assert "in _tick" in field.log  # the stacks
    with field.agent() as agent:
        wait_for(lambda: Slots(field.root).state("a").reason == "crashed")
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=10 * PATIENCE) == 0
    history = field.cli("status", "--history").stdout
    assert "rejected (hang)" in history
    assert "confirmed (crashed)" in history


HANGING = """
import sys, threading, time
def install():
    import device.app, pathlib
    real = device.app.Agent._tick
    def _tick(self):
        while (self._root / "hang").exists():
            time.sleep(0.1)
        real(self)
    device.app.Agent._tick = _tick
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "device.serving":  # loaded by device.app
            threading.Timer(0.5, install).start()
        return None
sys.meta_path.insert(0, Finder())
"""
"""Loaded by the agent's interpreter at its start: from the moment that ROOT/hang exists, the frame loop waits."""


def environment_with(site: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_how_the_last_run_ended(tmp_path: Path):
    assert last_crash(tmp_path) == ""
    begin_run(tmp_path)
    assert "ended without a word" in last_crash(tmp_path)
    begin_run(tmp_path, detail="it hung")
    assert last_crash(tmp_path) == "it hung"
    running = tmp_path / "running"
    running.write_text(running.read_text().replace('"boot": "', '"boot": "x'))
    assert last_crash(tmp_path) == ""  # the board was restarted since
    running.write_text("{")
    assert last_crash(tmp_path) == ""
    end_run(tmp_path)
    end_run(tmp_path)
    assert not running.exists()


def test_begin_run_on_a_full_disk_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    begin_run(tmp_path / "none")
    assert "cannot be written" in caplog.text


def test_threads_end_with_the_watchdog():
    watchdog = Watchdog(
        {"it": Heart(silence_s=lambda: 0.0, limit_s=1.0)}, notifier=Notifier(), supervisor_s=0, on_hang=print
    )
    watchdog.start()
    watchdog.stop()
    assert watchdog.thread not in threading.enumerate()


def test_an_agent_that_was_killed_is_counted(field: Field):
    field.cli("update")
    with field.agent() as agent:
        wait_for(lambda: (field.root / "running").exists())
        agent.kill()
    with field.agent():
        wait_for(lambda: Slots(field.root).state("a").reason == "crashed")
    assert "ended without a word" in Slots(field.root).state("a").detail
