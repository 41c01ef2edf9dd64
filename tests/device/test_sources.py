"""Frame sources without a camera: how frames are handed over, counted and dropped, and messages that hold pictures."""

import hashlib
import io
import os
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import device.sources.grabber
from device.config import AgentConfig, BrokerConfig, SourceConfig
from device.contract.errors import ConfigError, FrameError
from device.contract.messages import MAX_FRAME_PAYLOAD_BYTES, UNITS
from device.doctor_sources import check_source
from device.frames import Frame, decode_frame
from device.pictures import grey_of
from device.snapshot import encode_png
from device.sources.camera import CameraCapture, CameraMode
from device.sources.grabber import Capture, Grabber
from device.sources.handover import Handover
from device.sources.messages import MessageSource
from device.sources.open import open_source
from device.sources.source import Tally
from host.data.pictures import decode
from tests.support.agent import wait_for

SIZE = (6, 8, 3)


def npy(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(autouse=True, scope="module")
def quick_backoff() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.sources.grabber, "BACKOFF_S", (0.01, 0.05))
        patch.setattr(device.sources.grabber, "STOP_S", 0.1)  # a pipe's reader cannot be interrupted
        yield


class PipeCapture:
    """Raw frames from a named pipe: a device that comes, goes, and hangs, without a camera."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FrameError(f"{path}: is unplugged", reason="source")
        self._file = path.open("rb", buffering=0)
        self._count = 0

    def read(self, _stop: threading.Event) -> tuple[str, np.ndarray] | None:
        size = int(np.prod(SIZE))
        content = self._file.read(size)
        if len(content) != size:
            raise FrameError("the pipe gives no more frames", reason="source")
        self._count += 1
        return f"pipe/{self._count}", np.frombuffer(content, np.uint8).reshape(SIZE)

    def close(self) -> None:
        self._file.close()


def started(open_capture: Callable[[], Capture]) -> Grabber:
    source = Grabber("pipe", open_capture, is_live=True)
    source.start()
    return source


def take(source: Grabber, timeout_s: float = 10.0) -> Frame:
    """The next frame, to come within that time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for frame in source.poll(3):
            return frame
        source.wait(0.1, threading.Event())
    raise TimeoutError(f"no frame within {timeout_s} s; {source.problem}")


def test_a_device_that_goes_away_is_counted_reported_and_opened_again(tmp_path: Path):
    pipe = tmp_path / "pipe"
    source = started(lambda: PipeCapture(pipe))
    try:
        wait_for(lambda: source.problem.endswith("is unplugged") and source.tally.bad["source"] >= 2)
        for number in range(3):
            os.mkfifo(pipe)
            with pipe.open("wb", buffering=0) as camera:
                camera.write(bytes([number]) * int(np.prod(SIZE)))
                assert (take(source).pixels == number).all()
                assert source.problem == ""
                pipe.unlink()
            failures = source.tally.bad["source"]
            wait_for(lambda: source.problem != "" and source.tally.bad["source"] > failures)  # noqa: B023
    finally:
        source.stop()


def test_a_device_that_hangs_holds_nobody_up_and_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device.sources.grabber, "STALL_S", 0.2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    source = started(lambda: PipeCapture(pipe))
    began = time.monotonic()
    assert list(source.poll(3)) == []
    assert time.monotonic() - began < 0.1
    wait_for(lambda: "no frame for" in source.problem)
    with pipe.open("wb", buffering=0) as camera:
        camera.write(bytes(np.prod(SIZE)))
        take(source)
        assert source.problem == ""
        source.stop()


def test_a_live_source_gives_the_newest_frame_and_counts_the_others(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    source = started(lambda: PipeCapture(pipe))
    seen = []
    with pipe.open("wb", buffering=0) as camera:
        for number in range(60):
            camera.write(bytes([number]) * int(np.prod(SIZE)))
            time.sleep(0.002)
            if number % 10 == 9:
                wait_for(lambda: source.tally.dropped + len(seen) == number)  # noqa: B023  (all but one are accounted for)
                seen.append(int(take(source).pixels[0, 0, 0]))
        source.stop()
    assert seen == [9, 19, 29, 39, 49, 59]
    assert source.tally.dropped == 54
    assert source.tally.window() == {"frames/dropped": 54}
    assert source.tally.window() == {}


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 4), count=st.integers(0, 200))
def test_nothing_is_lost_or_turned_round_between_threads(size: int, count: int):
    handover: Handover[int] = Handover(size)
    never = threading.Event()
    writer = threading.Thread(target=lambda: [handover.put_when_there_is_room(i, never) for i in range(count)])
    writer.start()
    taken: list[int] = []
    while len(taken) < count:
        handover.wait(5.0, never)
        taken += list(iter(handover.take, None))
    writer.join()
    assert taken == list(range(count))
    dropped = sum(handover.put_newest(i) for i in range(count))
    assert list(iter(handover.take, None)) == list(range(count))[-size:]
    assert dropped == max(0, count - size)


def test_waiting_ends_with_the_agent():
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    began = time.monotonic()
    Handover(1).wait(30.0, stop)
    assert time.monotonic() - began < 5


def test_counts_are_what_telemetry_knows():
    tally = Tally()
    for reason in ("unreadable", "too-large", "shape", "source", "shape"):
        tally.count_bad(reason)
    tally.count_dropped()
    window = tally.window()
    assert window["errors/shape"] == 2
    assert len(window) == 5
    assert window.keys() <= UNITS.keys()
    assert tally.bad["shape"] == 2


@given(st.integers(0, 2**32 - 1))
def test_grey_is_pillow_s(seed: int):
    rgb = np.random.default_rng(seed).integers(0, 256, (31, 33, 3), dtype=np.uint8)
    np.testing.assert_array_equal(grey_of(rgb)[:, :, 0], np.asarray(Image.fromarray(rgb).convert("L")))


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]


@settings(deadline=None)
@given(
    st.sampled_from(MODES), st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, 3, 6, 8]), st.integers(0, 99)
)
def test_a_board_decodes_what_the_host_decodes(mode: str, height: int, width: int, turned: int | None, seed: int):
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert(mode)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = turned
    content = saved(picture, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
    expected = decode(io.BytesIO(content))
    np.testing.assert_array_equal(decode_frame(content, "a", 3), expected)
    np.testing.assert_array_equal(decode_frame(content, "a", 1), grey_of(expected))


def messages(*payloads: bytes, size: int = 4) -> MessageSource:
    source = MessageSource(size)
    for payload in payloads:
        source.receive(payload, is_retained=False)
    return source


def test_pictures_of_every_kind_come_as_messages():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    payloads = [npy(rgb), b"P6 7 5 255\n" + rgb.tobytes(), saved(Image.fromarray(rgb), "PNG"), encode_png(rgb)]
    frames = list(messages(*payloads).poll(3))
    assert len(frames) == 4
    for payload, frame in zip(payloads, frames, strict=True):
        assert frame.frame_id == f"mqtt/{hashlib.sha256(payload).hexdigest()[:16]}"
        np.testing.assert_array_equal(frame.pixels, rgb)
    jpeg = saved(Image.fromarray(rgb), "JPEG")
    np.testing.assert_array_equal(next(messages(jpeg).poll(3)).pixels, decode(io.BytesIO(jpeg)))


def test_the_newest_messages_win():
    source = messages(*(npy(np.full((2, 2), i, np.uint8)) for i in range(10)), size=3)
    assert [int(frame.pixels[0, 0, 0]) for frame in source.poll(1)] == [7, 8, 9]
    assert source.tally.dropped == 7


def test_what_is_too_large_retained_or_damaged_is_refused_by_reason():
    good = npy(np.zeros((2, 2), np.uint8))
    source = messages(
        b"no picture", bytes(MAX_FRAME_PAYLOAD_BYTES + 1), bomb(60_000, 60_000), bomb(6000, 6000), good, size=9
    )
    source.receive(good, is_retained=True)
    source.receive(saved(Image.new("RGB", (4, 4)), "GIF"), is_retained=False)
    assert len(list(source.poll(1))) == 1
    assert source.tally.bad == {"unreadable": 3, "too-large": 3}


def test_bad_messages_do_not_keep_the_frame_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.sources.messages.BAD_FRAMES_S", -1.0)
    source = messages(b"no picture", b"nor this", npy(np.zeros((2, 2), np.uint8)))
    assert list(source.poll(1)) == []
    assert source.tally.bad == {"unreadable": 1}
    assert sum(len(list(source.poll(1))) for _ in range(2)) == 1


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it is of that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


PICTURE = saved(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG")
PHOTO = saved(Image.new("RGB", (9, 9), (1, 2, 3)), "JPEG")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([PICTURE, PHOTO, npy(np.zeros((3, 3), np.uint8))]), st.data())
def test_no_message_ends_the_frame_loop(content: bytes, data):
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    source = messages(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    frames = list(source.poll(3))
    assert len(frames) + sum(source.tally.bad.values()) == 1
    assert all(frame.pixels.dtype == np.uint8 for frame in frames)


def test_what_is_not_installed_is_said_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for config in (SourceConfig(kind="camera", device="/dev/video0"), SourceConfig(kind="video", path="a.avi")):
        with pytest.raises(ConfigError, match=r"pip install 'fieldvit\[camera\]'"):
            open_source(config, tmp_path)
        assert "fieldvit[camera]" in check_source(tmp_path, config, is_running=False).text
    monkeypatch.setitem(sys.modules, "picamera2", None)
    with pytest.raises(ConfigError, match="apt install python3-picamera2"):
        open_source(SourceConfig(kind="picamera"), tmp_path)


def test_the_doctor_knows_directories_and_messages(tmp_path: Path):
    assert not check_source(tmp_path, SourceConfig(), is_running=False).ok
    (tmp_path / "frames").mkdir()
    assert check_source(tmp_path, SourceConfig(), is_running=False).ok
    assert "of any kind" in check_source(tmp_path, SourceConfig(kind="mqtt"), is_running=True).text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "film"}, "must be one of directory, video"),
        ({"kind": "video"}, "must name the video file"),
        ({"kind": "camera"}, "like /dev/video0, got ''"),
        ({"kind": "camera", "device": "/etc/passwd"}, "like /dev/video0"),
        ({"kind": "camera", "device": "/dev/../etc/passwd"}, "like /dev/video0"),
        ({"kind": "picamera", "device": "front"}, "CSI camera's number"),
        ({"kind": "camera", "device": "/dev/video0", "width": 640}, "belong together"),
        ({"kind": "camera", "device": "/dev/video0", "fps": -1}, "fps 0..1000"),
        ({"kind": "camera", "device": "/dev/video0", "loop": True}, "source.loop means nothing"),
        ({"device": "/dev/video0"}, "source.device means nothing where source.kind is 'directory'"),
        ({"kind": "mqtt", "queue": 0}, "queue must be 1..64"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        SourceConfig(**values)


def test_pictures_over_mqtt_need_a_broker():
    board = {"site": "lab", "device": "cam-1", "board": "generic-x86-64", "source": SourceConfig(kind="mqtt")}
    with pytest.raises(ConfigError, match=r"needs \[broker\]"):
        AgentConfig(**board)
    assert AgentConfig(**board, broker=BrokerConfig(hostname="hub")).source.queue == 4


def test_a_camera_that_is_none_is_an_error_and_no_more(tmp_path: Path):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    with pytest.raises(FrameError, match="is it plugged in") as caught:
        CameraCapture("/dev/video-that-is-not-there", CameraMode())
    assert caught.value.reason == "source"
    with pytest.raises(FrameError, match="cannot be opened as a camera"):
        CameraCapture("/dev/null", CameraMode(width=640, height=480, fps=15))
    config = SourceConfig(kind="camera", device="/dev/video-that-is-not-there")
    assert check_source(tmp_path, config, is_running=False).advice.startswith("plug the camera in")


class StandIn:
    """What is used of picamera2, which runs on a Raspberry Pi alone: its manual's names, and a camera that gives two frames."""

    opened: ClassVar[list["StandIn"]] = []

    def __init__(self, number: int) -> None:
        self.number, self.frames, self.is_closed = number, 2, False
        StandIn.opened.append(self)

    @staticmethod
    def global_camera_info() -> list[dict[str, object]]:
        return [{"Model": "imx708"}]

    def create_video_configuration(self, **options: object) -> dict[str, object]:
        return options

    def configure(self, configuration: dict[str, object]) -> None:
        self.configuration = configuration

    def start(self) -> None: ...

    def capture_array(self, _stream: str, *, wait: bool) -> int:
        assert not wait
        return self.frames

    def wait(self, job: int, *, timeout: float) -> np.ndarray:
        assert timeout > 0
        if not self.frames:
            raise TimeoutError
        self.frames -= 1
        return np.full(SIZE, job, np.uint8)

    def close(self) -> None:
        self.is_closed = True


def test_a_csi_camera_is_asked_for_rgb_and_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "picamera2", SimpleNamespace(Picamera2=StandIn))
    StandIn.opened.clear()
    source = open_source(SourceConfig(kind="picamera", width=640, height=480, fps=10), tmp_path)
    source.start()
    wait_for(lambda: len(StandIn.opened) >= 3)
    source.stop()
    assert all(camera.is_closed for camera in StandIn.opened)
    main = {"format": "BGR888", "size": (640, 480)}  # which is RGB in memory, says its manual
    assert StandIn.opened[0].configuration == {"main": main, "controls": {"FrameRate": 10}, "queue": False}
    assert source.tally.bad["source"] >= 2
    absent = check_source(tmp_path, SourceConfig(kind="picamera", device="1"), is_running=False)
    assert (absent.ok, "CSI camera 1 is not there" in absent.text) == (False, True)


@pytest.mark.skipif(not list(Path("/dev").glob("video*")), reason="this machine has no camera (/dev/video*)")
def test_a_real_camera_gives_frames(tmp_path: Path):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    device_file = str(min(Path("/dev").glob("video*")))
    source = open_source(SourceConfig(kind="camera", device=device_file), tmp_path)
    source.start()
    first, second = take(source), take(source)
    source.stop()
    assert first.pixels.shape == second.pixels.shape
    assert first.frame_id != second.frame_id
