"""The frame source: each file once, in order; half-written files wait, damaged ones are counted once."""

import contextlib
import itertools
import logging
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from device.contract.errors import FrameError
from device.frames import read_frame
from device.sources.directory import SETTLE_S, DirectorySource, frame_id_of, list_frames
from device.sources.source import TOLD_PER_MINUTE, Tally

PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 6)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ids(source: DirectorySource, channels: int = 1) -> list[str]:
    return [frame.frame_id for frame in source.poll(channels)]


def write_pgm(
    path: Path, pixels: np.ndarray = PIXELS, header: bytes = b"P5\n# a camera wrote this\n6 4\n255\n"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + pixels.tobytes())
    return path


def test_each_file_is_read_once_in_the_order_of_names(tmp_path: Path):
    source = DirectorySource(tmp_path)
    for name in ("b.pgm", "a/z.pgm", "c.pgm"):
        write_pgm(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    write_pgm(tmp_path / ".hidden.pgm")
    write_pgm(tmp_path / ".git" / "x.pgm")
    assert ids(source) == ["a/z", "b", "c"]
    write_pgm(tmp_path / "0.pgm")
    assert ids(source) == ["0"]
    assert ids(source) == []


def test_a_missing_directory_is_an_empty_one(tmp_path: Path):
    assert ids(DirectorySource(tmp_path / "none")) == []


def test_a_file_that_comes_back_is_new(tmp_path: Path):
    source = DirectorySource(tmp_path)
    write_pgm(tmp_path / "a.pgm")
    assert ids(source) == ["a"]
    (tmp_path / "a.pgm").unlink()
    assert ids(source) == []
    write_pgm(tmp_path / "a.pgm")
    assert ids(source) == ["a"]


def test_a_half_written_file_waits_and_is_read_when_whole(tmp_path: Path):
    clock = Clock()
    source, path = DirectorySource(tmp_path, clock=clock), write_pgm(tmp_path / "a.pgm")
    content = path.read_bytes()
    for size in (0, 5, 20, len(content) - 1):
        path.write_bytes(content[:size])
        assert ids(source) == []
        clock.now += 0.9 * SETTLE_S
    path.write_bytes(content)
    assert ids(source) == ["a"]
    assert source.tally.bad == {}


def test_a_damaged_file_is_reported_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    clock = Clock()
    source = DirectorySource(tmp_path, clock=clock)
    (tmp_path / "a.png").write_bytes(b"\x89PNG damaged")
    write_pgm(tmp_path / "b.pgm")
    with caplog.at_level(logging.WARNING):
        seen = ids(source)
        for _ in range(5):
            clock.now += SETTLE_S
            seen += ids(source)
    assert seen == ["b"]
    assert source.tally.bad == {"unreadable": 1}
    assert len(caplog.records) == 1


def test_many_bad_frames_are_all_counted_but_do_not_fill_the_log(caplog: pytest.LogCaptureFixture):
    clock = Clock()
    tally = Tally(clock=clock)
    for k in range(1000):
        tally.skip(f"{k}.png: cannot be read", "unreadable")
    assert len(caplog.records) == TOLD_PER_MINUTE + 1
    assert "'fieldvit-device status' counts them all" in caplog.messages[-1]
    clock.now += 60
    tally.skip("late.png: cannot be read", "unreadable")
    assert caplog.messages[-1] == "frame skipped: late.png: cannot be read"
    assert tally.bad == {"unreadable": 1001}


def test_formats_give_the_same_pixels(tmp_path: Path):
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(PIXELS))
    write_pgm(tmp_path / "b.pgm")
    Image.fromarray(PIXELS).save(tmp_path / "c.png")
    for name in ("a.npy", "fortran.npy", "b.pgm", "c.png"):
        np.testing.assert_array_equal(read_frame(tmp_path / name, 1), PIXELS[:, :, None])
    color = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    write_pgm(tmp_path / "d.ppm", color, b"P6 5 3 255\n")
    Image.fromarray(color).save(tmp_path / "e.png")
    np.testing.assert_array_equal(read_frame(tmp_path / "d.ppm", 3), color)
    np.testing.assert_array_equal(read_frame(tmp_path / "e.png", 3), color)
    assert read_frame(tmp_path / "e.png", 1).shape == (3, 5, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"no array", "not a .npy array"),
        ("a.pgm", b"P2\n6 4\n255\n", "not a binary PGM"),
        ("a.pgm", b"P5 6 4 65535\n" + bytes(48), "expected 8 bits"),
        ("a.pgm", b"P5 0 4 255\n", "expected 8 bits"),
        ("a.pgm", b"P5 " + b"9" * 5000 + b" 8 255\n", "not a binary PGM"),
        ("a.pgm", b"P5" + b" " * 4000 + b"x", "not a binary PGM"),  # a nested quantifier would try 2^4000 ways
        (
            "a.npy",
            b"\x93NUMPY\x01\x00vv{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 5000,
            "not a .npy",
        ),
        ("a.png", b"no image", r"Pillow cannot decode it \(it is none of PNG"),
        ("a.txt", b"", "frames are .bmp"),
    ],
)
def test_what_is_no_frame_is_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FrameError, match=message):
        read_frame(tmp_path / name, 1)


def test_arrays_of_other_kinds_are_refused(tmp_path: Path):
    for array in (PIXELS.astype(np.float32), PIXELS[0], np.array([{}], dtype=object), np.zeros((0, 4), np.uint8)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(FrameError, match="expected uint8"):
            read_frame(tmp_path / "a.npy", 1)


@given(st.data())
def test_no_damage_to_a_raw_file_escapes_as_another_error(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("frames")
    name = data.draw(st.sampled_from(["a.npy", "a.pgm"]))
    np.save(directory / "a.npy", PIXELS)
    write_pgm(directory / "a.pgm")
    content = bytearray((directory / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (directory / name).write_bytes(content)
    with contextlib.suppress(FrameError):
        assert read_frame(directory / name, 1).dtype == np.uint8


def test_without_pillow_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(FrameError, match=r"needs Pillow; 'pip install pillow'"):
        read_frame(tmp_path / "a.png", 1)


def test_ids_are_relative_paths_made_safe(tmp_path: Path):
    assert frame_id_of("day 1/a\nb.png") == "day_1/a_b"
    write_pgm(tmp_path / "x" / "y.pgm")
    assert list_frames(tmp_path) == [("x/y", tmp_path / "x" / "y.pgm")]
    assert list_frames(tmp_path / "x" / "y.pgm")[0][0] == "y"


def test_no_error_of_a_decoder_ends_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> np.ndarray:
        raise ZeroDivisionError("a bug of the decoder")

    monkeypatch.setattr("device.frames._parse_npy", fail)
    clock = Clock()
    source = DirectorySource(tmp_path, clock=clock)
    np.save(tmp_path / "a.npy", PIXELS)
    write_pgm(tmp_path / "b.pgm")
    assert ids(source) == ["b"]
    clock.now += SETTLE_S
    assert ids(source) == []
    assert source.tally.bad == {"unreadable": 1}


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_never_ends_is_no_frame(tmp_path: Path, kind: str):
    path = tmp_path / "a.npy"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    clock = Clock()
    source = DirectorySource(tmp_path, clock=clock)
    write_pgm(tmp_path / "b.pgm")
    assert ids(source) == ["b"]
    clock.now += SETTLE_S
    assert ids(source) == []
    assert source.tally.bad == {"unreadable": 1}


def test_bad_frames_do_not_keep_the_frame_loop(tmp_path: Path):
    source = DirectorySource(tmp_path, clock=itertools.count().__next__)  # a second passes whenever it looks
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    write_pgm(tmp_path / "z.pgm")
    assert ids(source) == []
    assert source.tally.bad == {}  # it has not come to the end
    started = time.monotonic()
    source.wait(60, threading.Event())
    assert time.monotonic() - started < 5
    seen = [ids(source) for _ in range(40)]
    assert [look for look in seen if look] == [["z"]]
    assert source.tally.bad == {"unreadable": 5}


def test_an_image_too_large_for_the_board_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr("device.frames.MAX_FRAME_BYTES", 1000)
    assert read_frame(tmp_path / "a.png", 1).shape == (4, 6, 1)
    monkeypatch.setattr("device.frames.MAX_FRAME_BYTES", (tmp_path / "a.png").stat().st_size)
    Image.fromarray(np.zeros((90, 90), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(FrameError, match="limit"):
        read_frame(tmp_path / "a.png", 3)


def test_a_grey_model_has_no_room_for_more_pixels_than_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.fromarray(np.zeros((90, 90), np.uint16)).save(tmp_path / "a.png")
    assert read_frame(tmp_path / "a.png", 1).shape == (90, 90, 1)
    monkeypatch.setattr("device.frames.MAX_FRAME_BYTES", 2 * 90 * 90)
    with pytest.raises(FrameError, match="90x90 pixels are over the limit"):
        read_frame(tmp_path / "a.png", 1)


def test_files_that_share_an_id_get_ids_of_their_own(tmp_path: Path):
    source = DirectorySource(tmp_path)
    write_pgm(tmp_path / "a.pgm")
    write_pgm(tmp_path / "x y.pgm")
    assert ids(source) == ["a", "x_y"]
    np.save(tmp_path / "a.npy", PIXELS)
    write_pgm(tmp_path / "x_y.pgm")
    late = ids(source)
    assert [name.partition("~")[0] for name in late] == ["a", "x_y"]
    assert all("~" in name for name in late)
    restarted = ids(DirectorySource(tmp_path))  # now all came before they were read: none may be taken for another
    assert len(set(restarted)) == 4
    assert set(late) < set(restarted)
    assert not {"a", "x_y"} & set(restarted)
    assert [frame_id for frame_id, _ in list_frames(tmp_path)] == restarted
    (tmp_path / "a.pgm").unlink()
    (tmp_path / "x_y.pgm").unlink()
    assert ids(DirectorySource(tmp_path)) == ["a", "x_y"]
