"""The start: the first frame is answered before the rest of the agent is loaded, and nothing is served unverified."""

import subprocess
import sys
from pathlib import Path

import pytest

from device.config import load_config
from device.contract.board import load_board
from device.contract.errors import EngineError
from device.engine import Engine
from device.opening import Opening
from device.slots import Slots
from tests.support.agent import DEVICE_PYTHON, REPO_ROOT, Field, wait_for
from tests.support.tiny_bundle import LABELS, write_frames


@pytest.fixture
def served(field: Field) -> Field:
    """A board with one confirmed release."""
    assert field.cli("update").returncode == 0
    return field


def begin(field: Field) -> Opening:
    config = load_config(field.root)
    return Opening(field.root, config, load_board(config.board))


def test_the_first_frame_is_answered_once_and_counts(served: Field):
    (name,) = (path.stem for path in write_frames(served.root / "frames", 1, 2))
    opening = begin(served)
    first = opening.take_first()
    features, answer = first.outcome
    assert (first.frame.frame_id, answer.label) == (name, LABELS[2])
    assert features.shape == (opening.serving.model.manifest.learning.feature_dim,)
    assert opening.take_first() is None
    assert not list(opening.source.poll(1))


def test_what_talks_updates_or_teaches_is_not_loaded_for_it(served: Field):
    write_frames(served.root / "frames", 1, 2)
    code = (
        "import sys; from pathlib import Path; from device.config import load_config\n"
        "from device.contract.board import load_board; from device.opening import Opening\n"
        "root = Path(sys.argv[1]); config = load_config(root)\n"
        "assert Opening(root, config, load_board(config.board)).take_first()\n"
        "print(*(n for n in sys.modules if n in ('device.app', 'device.updater', 'device.commands', 'sqlite3', 'paho')))"
    )
    python = DEVICE_PYTHON if DEVICE_PYTHON.exists() else Path(sys.executable)
    done = subprocess.run(
        [python, "-c", code, served.root], cwd=REPO_ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


def test_an_interpreter_that_fails_on_the_first_frame_is_told(served: Field, monkeypatch: pytest.MonkeyPatch):
    def gone(*_: object) -> None:
        raise EngineError("the accelerator is gone")

    monkeypatch.setattr(Engine, "features", gone)
    write_frames(served.root / "frames", 1, 2)
    assert "accelerator" in str(begin(served).take_first().outcome)


@pytest.mark.parametrize("name", ["model.int8.tflite", "head.npz", "manifest.json"])
def test_a_damaged_file_is_not_served(served: Field, name: str):
    slots = Slots(served.root)
    path = slots.directory(slots.serving().slot) / name
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    write_frames(served.root / "frames", 1, 2)
    opening = begin(served)
    assert opening.serving.model is None
    assert opening.take_first() is None
    assert Slots(served.root).serving() is None


def test_a_model_on_probation_waits_for_the_rest_of_the_agent(served: Field):
    served.publish(2)
    served.configure(update="check_interval_s = 0.2", runtime="soak_frames = 100000\nsoak_s = 100000\n")
    with served.agent() as agent:
        wait_for(lambda: Slots(served.root).serving().state == "testing")
        agent.kill()
        agent.wait()
    served.lose_power()
    write_frames(served.root / "frames", 1, 2)
    opening = begin(served)
    assert opening.serving.model is None
    assert opening.take_first() is None
    opening.finish()
    assert opening.serving.model.manifest.release == 2


def test_a_start_that_hangs_ends_the_process_though_python_stands_still():
    code = (
        "import ctypes, device.opening as o; o.START_S = 0.3\n"
        "with o._ended_if_it_hangs(): ctypes.PyDLL(None).sleep(60)"  # PyDLL keeps the interpreter's lock
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, timeout=40)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "_ended_if_it_hangs" in code
