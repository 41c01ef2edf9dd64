"""A rollout to a real agent, carried on by the real monitor: taken by command, given back by command, or refused."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from device.slots import Slots
from host.cli import app
from host.monitor.app import MonitorConfig, Ready, run_monitor
from host.monitor.rollout.journal import Journal
from tests.support.agent import Field, wait_for
from tests.support.patience import PATIENCE
from tests.support.tiny_bundle import convert_tiny_model, wrong_golden

SOON = ("--stages", "100%", "--soak", "0.5", "--max-drift", "1e9")


@pytest.fixture
def field(tmp_path: Path) -> Field:
    field = Field.create(tmp_path, convert_tiny_model(tmp_path))
    field.publish(1)
    return field


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[Ready]:
    stop, found = threading.Event(), []
    config = MonitorConfig(store=tmp_path / "store.sqlite", broker_port=0, http_port=0, rollouts=tmp_path / "rollouts")
    is_ready = threading.Event()

    def on_ready(ready: Ready) -> None:
        found.append(ready)
        is_ready.set()

    thread = threading.Thread(target=run_monitor, args=(config,), kwargs={"stop": stop, "on_ready": on_ready})
    thread.start()
    assert is_ready.wait(20 * PATIENCE)
    yield found[0]
    stop.set()
    thread.join(20 * PATIENCE)


def rollout(*words: object) -> str:
    done = CliRunner().invoke(app, ["rollout", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def test_an_agent_takes_a_release_gives_it_back_and_refuses_a_bad_one(field: Field, ready: Ready, tmp_path: Path):
    root = tmp_path / "rollouts"
    field.configure(port=ready.broker.port)
    with field.agent():
        wait_for(lambda: (entry := Slots(field.root).serving()) and entry.state == "confirmed")
        good = field.publish(2, channel="canary")
        rollout("start", good, "--channel", "canary", "--id", "good", *SOON, "--rollouts", root)
        wait_for(lambda: Journal(root / "good").progress.status == "finished", 60)
        assert Slots(field.root).serving().release == 2
        shown = rollout("show", "good", "--rollouts", root)
        assert "lab/cam-1 confirmed" in shown
        assert "lab/cam-1 done" in shown

        rollout("abort", "good", "--why", "wrong labels", "--rollouts", root)
        wait_for(lambda: Journal(root / "good").progress.count("reverted") == 1, 60)
        assert Slots(field.root).serving().release == 1

        bad = field.publish(3, channel="canary", files=wrong_golden(field.model))
        rollout("start", bad, "--channel", "canary", "--id", "bad", *SOON, "--rollouts", root)
        wait_for(lambda: Journal(root / "bad").progress.status == "aborted", 60)
        assert "golden features differ" in Journal(root / "bad").progress.reason
        assert Slots(field.root).serving().release == 1
    listed = rollout("list", "--rollouts", root)
    assert "aborted" in listed
    assert "tiny 3.0.0" in listed
