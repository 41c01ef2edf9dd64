"""The agent with frames that do not come as files: from a video, and over a real broker."""

import hashlib
import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device.contract.messages import decode_event, decode_result, decode_state, decode_telemetry
from tests.support.agent import PREFIX, Field, wait_for
from tests.support.broker import Listener, listen, mosquitto
from tests.support.tiny_bundle import LABELS, make_frames


@pytest.fixture(autouse=True)
def with_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent runs where Pillow and OpenCV are installed; a board's environment has neither by default."""
    monkeypatch.setenv("FIELDVIT_DEVICE_PYTHON", sys.executable)


def is_ready(payload: bytes) -> bool:
    return decode_state(payload).model is not None


def has(name: str) -> Callable[[bytes], bool]:
    return lambda payload: name in decode_telemetry(payload).values


def total(listener: Listener, name: str) -> float:
    return sum(decode_telemetry(payload).values.get(name, 0) for payload in listener.all("telemetry"))


def status(field: Field) -> dict[str, object]:
    return json.loads((field.root / "agent.json").read_bytes())


def npy(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, frame)
    return buffer.getvalue()


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame[:, :, 0]).save(buffer, "PNG")
    return buffer.getvalue()


def id_of(payload: bytes) -> str:
    return f"mqtt/{hashlib.sha256(payload).hexdigest()[:16]}"


def answer(listener: Listener, frame_id: str) -> str:
    return decode_result(listener.wait_for("result", lambda payload: decode_result(payload).frame_id == frame_id)).label


def test_pictures_come_over_mqtt_and_stay_nowhere(field: Field, tmp_path: Path):
    pictures = [encode(make_frames(1, i)[0]) for i in range(4) for encode in (npy, png)]
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:

        def publish(payload: bytes, *, retain: bool = False) -> None:
            listener.client.publish(f"{PREFIX}/frame", payload, qos=1, retain=retain).wait_for_publish(5)

        publish(pictures[0], retain=True)  # somebody's mistake, from before the agent came
        field.configure(port=port, top="results = true", source='kind = "mqtt"\nqueue = 4')
        field.cli("update")
        with field.agent() as agent:
            listener.wait_for("state", is_ready)
            listener.wait_for("telemetry", has("errors/unreadable"))
            assert listener.all("result") == []
            publish(b"", retain=True)  # taken away again: an empty message, and no frame either
            for number, picture in enumerate(pictures):
                publish(picture)
                assert answer(listener, id_of(picture)) == LABELS[number // 2]
            publish(b"no picture")
            publish(bytes(1_100_000))
            publish(npy(np.zeros((8, 8, 3), np.uint8)))
            listener.wait_for("telemetry", has("errors/shape"))
            wait_for(lambda: total(listener, "errors/too-large") == 1)
            publish(pictures[1])  # the agent goes on
            wait_for(lambda: len(listener.all("result")) == 9)
            wait_for(lambda: total(listener, "frames") == 9)
            assert total(listener, "errors") == total(listener, "errors/unreadable") + 2
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(timeout=10) == 0
        table = status(field)
        assert table["bad_frames"] == {"unreadable": total(listener, "errors/unreadable"), "too-large": 1, "shape": 1}
        assert table["source"] == "mqtt"
        field.configure(port=port)  # and then frames come from elsewhere
        with field.agent():
            wait_for(lambda: field.log.count("connected to") == 2)
            results = len(listener.all("result"))
            publish(pictures[2])
            wait_for(lambda: len(listener.all("telemetry")) > 2)
            assert len(listener.all("result")) == results
    kept = [path for path in field.root.rglob("*") if path.is_file() and pictures[2][-64:] in path.read_bytes()]
    assert kept == []


@pytest.mark.slow
def test_a_burst_leaves_the_newest_and_is_counted(field: Field, tmp_path: Path):
    pictures = [npy(frame) for frame in make_frames(200, 0)]
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        field.configure(port=port, top="results = true", source='kind = "mqtt"\nqueue = 2\nmax_fps = 20')
        field.cli("update")
        with field.agent():
            listener.wait_for("state", is_ready)
            for picture in pictures:
                listener.client.publish(f"{PREFIX}/frame", picture)
            answer(listener, id_of(pictures[-1]))
            wait_for(lambda: total(listener, "frames/dropped") + total(listener, "frames") == 200)
            assert total(listener, "frames/dropped") > 100
            wait_for(lambda: status(field)["frames_dropped"] == total(listener, "frames/dropped"))


def test_a_video_is_classified_to_its_end_and_its_loss_reported(field: Field, tmp_path: Path):
    video = pytest.importorskip("tests.support.video")
    frames = [np.repeat(make_frames(1, i % 4, seed=i)[0], 3, axis=2) for i in range(12)]
    path = video.write_video(field.root / "clip.avi", frames)
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        field.configure(port=port, top="results = true", source='kind = "video"\npath = "clip.avi"\nloop = true')
        field.cli("update")
        with field.agent() as agent:
            for number in range(12):
                assert answer(listener, f"clip/{number:06d}") == LABELS[number % 4]
            path.unlink()
            event = decode_event(listener.wait_for("event", lambda payload: decode_event(payload).kind == "error"))
            assert event.data["reason"] == "source"
            assert "no such video file" in event.data["detail"]
            listener.wait_for("telemetry", has("errors/source"))
            wait_for(lambda: "no such video file" in str(status(field)["source_problem"]))
            assert "PROBLEM" in field.cli("status").stdout
            video.write_video(tmp_path / "new.avi", frames[:3]).rename(path)
            wait_for(lambda: status(field)["source_problem"] == "")
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(timeout=10) == 0
        errors = [decode_event(payload) for payload in listener.all("event")]
        assert [event.data["reason"] for event in errors if event.kind == "error"] == ["source"]


def test_an_agent_without_opencv_says_what_to_install(field: Field, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "hidden" / "cv2").mkdir(parents=True)
    (tmp_path / "hidden" / "cv2" / "__init__.py").write_text("raise ImportError('No module named cv2')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    field.configure(source='kind = "camera"\ndevice = "/dev/video0"')
    result = field.cli("run")
    assert result.returncode == 2
    assert "pip install 'fieldvit[camera]'" in result.stderr
