"""Video files, written by OpenCV: every frame, in its own colours, to the end; and what is damaged is counted."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import device.sources.grabber
from device.config import SourceConfig
from device.contract.manifest import InputSpec
from device.doctor_sources import check_source
from device.frames import Frame, decode_frame
from device.pictures import grey_of
from device.preprocess import preprocess
from device.sources.grabber import Grabber
from device.sources.open import open_source
from host.data.inputs import to_input
from host.data.pictures import decode
from tests.support.agent import REPO_ROOT, wait_for
from tests.support.video import MOTION_JPEG, noise, write_video


@pytest.fixture(autouse=True, scope="module")
def quick_backoff() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.sources.grabber, "BACKOFF_S", (0.01, 0.05))
        yield


def opened(path: Path, **options: bool) -> Grabber:
    source = open_source(SourceConfig(kind="video", path=path.name, **options), path.parent)
    assert isinstance(source, Grabber)
    source.start()
    return source


def frames_of(source: Grabber, count: int, channels: int = 3) -> list[Frame]:
    """So many, to come within ten seconds; fewer where the video is at its end."""
    frames: list[Frame] = []
    deadline = time.monotonic() + 10
    while len(frames) < count and time.monotonic() < deadline:
        was_at_end = source.is_at_end
        new = list(source.poll(channels))
        frames += new
        if not new and was_at_end:
            break
        source.wait(0.02, threading.Event())
    return frames


def test_every_frame_comes_in_order_and_in_its_colours(tmp_path: Path):
    pixels = noise(12)
    source = opened(write_video(tmp_path / "day 1.avi", pixels))
    frames = frames_of(source, 99)
    assert [frame.frame_id for frame in frames] == [f"day_1/{i:06d}" for i in range(12)]
    np.testing.assert_array_equal([frame.pixels for frame in frames], pixels)
    assert source.is_at_end
    assert (source.problem, source.tally.bad, source.tally.dropped) == ("", {}, 0)
    source.stop()
    grey = opened(tmp_path / "day 1.avi")
    np.testing.assert_array_equal(frames_of(grey, 1, channels=1)[0].pixels, grey_of(pixels[0]))
    grey.stop()


def test_a_loop_begins_again(tmp_path: Path):
    source = opened(write_video(tmp_path / "a.avi", noise(3)), loop=True)
    assert [int(frame.frame_id[-1]) for frame in frames_of(source, 8)[:8]] == [0, 1, 2, 0, 1, 2, 0, 1]
    source.stop()
    assert source.tally.bad == {}


def test_in_real_time_a_slow_model_misses_frames_instead_of_falling_behind(tmp_path: Path):
    source = opened(write_video(tmp_path / "a.avi", noise(50), fps=50), realtime=True)
    seen, began = [], time.monotonic()
    while not source.is_at_end:
        seen += [int(frame.frame_id[-6:]) for frame in source.poll(3)]
        time.sleep(0.1)
    elapsed_s = time.monotonic() - began
    seen += [int(frame.frame_id[-6:]) for frame in source.poll(3)]
    source.stop()
    assert 0.9 < elapsed_s < 5  # a second of video, on a machine that may be busy
    assert seen == sorted(set(seen))
    assert seen[-1] == 49
    assert len(seen) + source.tally.dropped == 50
    assert source.tally.dropped > 20


def test_a_file_that_is_missing_or_damaged_is_tried_again_until_it_is_well(tmp_path: Path):
    path = tmp_path / "a.avi"
    source = opened(path)
    wait_for(lambda: "no such video file" in source.problem)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    wait_for(lambda: "may be damaged" in source.problem)
    assert source.tally.bad["source"] >= 2
    write_video(tmp_path / "b.avi", noise(4)).rename(path)
    assert len(frames_of(source, 4)) == 4
    assert source.problem == ""
    source.stop()


@pytest.mark.parametrize("loop", [False, True])
def test_a_video_that_is_cut_off_is_used_as_far_as_it_goes_and_counted(tmp_path: Path, loop: bool):
    path = write_video(tmp_path / "a.avi", noise(40), codec=MOTION_JPEG)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    source = opened(path, loop=loop)
    frames = frames_of(source, 60)
    wait_for(lambda: source.tally.bad.get("unreadable", 0) >= 1)
    assert "cut off or damaged" in source.problem or loop
    assert (len(frames) >= 60) is loop
    assert len({frame.frame_id for frame in frames}) in range(10, 30)
    assert source.is_at_end is not loop
    source.stop()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_damage_to_a_video_ends_the_thread(tmp_path_factory: pytest.TempPathFactory, data):
    path = tmp_path_factory.mktemp("video") / "a.avi"
    content = bytearray(write_video(path, noise(5), codec=MOTION_JPEG).read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    source = opened(path)
    wait_for(lambda: bool(list(source.poll(3))) or source.is_at_end or source.tally.bad != {})
    source.stop()
    assert not source._thread.is_alive()


sizes = st.integers(1, 20).map(lambda half: 2 * half)  # OpenCV writes even sizes only


@settings(max_examples=20, deadline=None)
@given(sizes, sizes, st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_all_sources_give_the_model_what_the_host_gives_it(
    tmp_path_factory: pytest.TempPathFactory, height, width, to_height, to_width, channels, seed
):
    """One picture as PNG, PPM, .npy and in a video: bit for bit the input that the host trains with."""
    directory = tmp_path_factory.mktemp("same")
    pixels = noise(2, height, width, seed=seed)
    spec = InputSpec(
        height=to_height, width=to_width, channels=channels, mean=(0.485,) * channels, std=(0.229,) * channels
    )
    buffers = [io.BytesIO() for _ in range(3)]
    Image.fromarray(pixels[0]).save(buffers[0], "PNG")
    Image.fromarray(pixels[0]).save(buffers[1], "PPM")
    np.save(buffers[2], pixels[0])
    host_pixels = decode(io.BytesIO(buffers[0].getvalue()))
    expected = to_input([host_pixels if channels == 3 else grey_of(host_pixels)], spec)
    ways = [decode_frame(buffer.getvalue(), "a", channels) for buffer in buffers]
    source = opened(write_video(directory / "a.avi", pixels))
    ways.append(frames_of(source, 1, channels)[0].pixels)
    source.stop()
    for way in ways:
        frame = way if way.shape[2] == channels else grey_of(way)  # raw files are taken as they are
        np.testing.assert_array_equal(preprocess(frame[None], spec), expected)


def test_nothing_is_printed_beside_the_agent_s_own_lines(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(3000))
    script = (
        "from pathlib import Path; from device.sources.camera import *; from device.sources.video import *\n"
        "for open_one in (lambda: VideoCapture(Path('a.mp4'), is_realtime=False), lambda: CameraCapture('/dev/null', CameraMode())):\n"
        "    try: open_one()\n"
        "    except FrameError: print('refused')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO_ROOT), environment.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("refused\n" * 2, "")


def test_the_doctor_reads_a_frame(tmp_path: Path):
    write_video(tmp_path / "a.avi", noise(2, 24, 32))
    config = SourceConfig(kind="video", path="a.avi")
    assert check_source(tmp_path, config, is_running=True).text == "a.avi: gives 32x24"
    (tmp_path / "a.avi").write_bytes(b"no video")
    assert not check_source(tmp_path, config, is_running=False).ok
