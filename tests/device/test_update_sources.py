"""Updates as a board makes them: over the web, of what it does not hold yet, at the hour and the rate it is told."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device.config import UpdateConfig, load_config, resolve_source
from device.contract.board import load_board
from device.contract.errors import ConfigError, UpdateRefusedError
from device.selftest import SelfTest
from device.slots import Slots
from device.trusted_time import TrustedTime
from device.updater import Updater
from device.window import Schedule, Window
from tests.support.agent import Field, wait_for
from tests.support.patience import PATIENCE
from tests.support.tiny_bundle import bundle_files, write_frames
from tests.support.web import serve

BOARD = load_board("generic-x86-64")
PASSED = SelfTest(
    precision="", golden_difference=0, load_s=0, latency_p50_ms=1, latency_p90_ms=1, latency_p99_ms=1, peak_memory_mb=1
)
BIG = np.random.default_rng(0).bytes(300_000)


class Board:
    """The updater of a board, and what it tells the world."""

    def __init__(self, field: Field, **keywords: Any) -> None:
        self.field, self.events = field, []
        self.slots = Slots(field.root)
        self.slots.recover(is_start=False)
        self.updater = Updater(
            field.root,
            load_config(field.root),
            BOARD,
            self.slots,
            run_selftest=lambda slot, precision: replace(PASSED, precision=precision),
            report=lambda kind, **data: self.events.append((kind, data)),
            **keywords,
        )

    def look(self, source: Path | str, **keywords: bool) -> bool:
        """Look, and confirm what comes; whether anything did."""
        staged = self.updater.stage(source, **keywords)
        if staged:
            self.slots.begin_testing(staged.slot, staged.test.precision)
            self.slots.confirm(staged.slot)
        return staged is not None


def test_only_what_changed_comes_over_the_web(field: Field):
    field.publish(2, files={"extra.bin": BIG})
    with serve(field.directory / "repo") as site:
        board = Board(field)
        assert board.look(site.url)
        field.publish(3, files={"extra.bin": BIG, "golden.npz": bundle_files(field.model)["golden.npz"] + b"\0"})
        assert board.look(site.url)
    (_, first), (_, second) = board.events
    assert [kind for kind, _ in board.events] == ["downloaded", "downloaded"]
    assert first["transferred_bytes"] == first["bytes"] > len(BIG)
    assert 0 < second["transferred_bytes"] < second["bytes"] - len(BIG)
    assert board.slots.serving().release == 3


def test_a_repository_without_indexes_is_transferred_whole(field: Field):
    board = Board(field)
    with serve(field.directory / "repo") as site:
        board.look(site.url)
        field.publish(2)
        site.where, site.status = "targets/parts/", 404
        assert board.look(site.url)
    assert board.events[1][1]["transferred_bytes"] == board.events[1][1]["bytes"]


def test_a_transfer_that_was_cut_off_goes_on_at_the_next_look(field: Field, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.download.RETRIES", 0)
    monkeypatch.setattr("device.download.RETRY_PAUSE_S", 0)
    field.publish(2, files={"extra.bin": BIG})
    with serve(field.directory / "repo") as site:
        site.where, site.cut_after, site.has_ranges = "tiny-2.0.0.fieldvit", 200_000, True
        with pytest.raises(UpdateRefusedError) as refused:
            Board(field).look(site.url)
        assert refused.value.reason == "unreachable"
        site.cut_after = None
        board = Board(field)
        assert board.look(site.url)
        assert site.asked("tiny-2.0.0")[-1] == "bytes=200000-"
    ((_, data),) = board.events
    assert data["transferred_bytes"] == data["bytes"] - 200_000


def test_the_window_holds_what_nobody_asked_for(field: Field):
    is_open = [False]
    schedule = Schedule(
        Window(start=0, end=60, days=frozenset(range(7))),
        is_clock_wrong=lambda: False,
        local_time=lambda: time.struct_time((2026, 1, 5, 0 if is_open[0] else 9, 0, 0, 0, 5, 0)),
    )
    board, source = Board(field, schedule=schedule), field.directory / "repo"
    assert board.look(source, is_asked=False)  # a board without any model cannot wait
    field.publish(2)
    assert not board.look(source, is_asked=False)
    is_open[0] = True
    assert board.look(source, is_asked=False)
    is_open[0] = False
    field.publish(3)
    assert board.look(source)


def test_a_window_that_closes_stops_the_transfer(field: Field):
    board = Board(field)
    board.look(field.directory / "repo")
    field.publish(2, files={"extra.bin": BIG})

    def hour() -> int:
        return 9 if any((field.root / "downloads").glob("*.part")) else 0

    schedule = Schedule(
        Window(start=0, end=60, days=frozenset(range(7))),
        is_clock_wrong=lambda: False,
        local_time=lambda: time.struct_time((2026, 1, 5, hour(), 0, 0, 0, 5, 0)),
    )
    with pytest.raises(UpdateRefusedError) as refused:
        Board(field, schedule=schedule).look(field.directory / "repo", is_asked=False)
    assert refused.value.reason == "window"
    assert board.slots.serving().release == 1
    assert [path.suffix for path in (field.root / "downloads").iterdir()] == [".part"]


def test_a_board_at_1970_installs_what_is_good_and_its_time_is_kept(field: Field):
    board = Board(field, time=TrustedTime(field.root / "clock.json", clock=lambda: 0.0))
    assert board.look(field.directory / "repo")
    kept = json.loads((field.root / "clock.json").read_text())
    assert abs(kept["anchor"] - time.time()) < 600


def test_a_stop_ends_a_slow_transfer_at_once_and_keeps_what_came(field: Field):
    field.publish(2, files={"extra.bin": BIG})
    field.configure(update="max_bytes_per_s = 50000")
    with serve(field.directory / "repo") as site, field.agent() as agent:
        config = field.root / "agent.toml"
        config.write_text(config.read_text().replace(f"dir:{field.directory}/repo", site.url))
        agent.kill()
        with field.agent() as agent:
            wait_for(lambda: any((field.root / "downloads").glob("*.part")))
            time.sleep(0.3)
            started = time.monotonic()
            agent.terminate()
            agent.wait(timeout=10 * PATIENCE)
            assert time.monotonic() - started < 5
        (part,) = (field.root / "downloads").iterdir()
        came = part.stat().st_size
        assert came > 0
        config.write_text(config.read_text().replace("max_bytes_per_s = 50000", ""))
        with field.agent():
            wait_for(lambda: Slots(field.root).serving() is not None)
        assert site.asked("tiny-2.0.0")[-1] == f"bytes={came}-"


def test_the_command_takes_an_address(field: Field):
    write_frames(field.root / "frames", 1, 0)
    with serve(field.directory / "repo") as site:
        result = field.cli("update", "--from", site.url)
        assert result.returncode == 0, result.stderr
        assert "installed and confirmed" in result.stdout
        assert "bytes were transferred" in result.stderr
        again = field.cli("update", "--from", site.url)
        assert f"is up to date with {site.url}, channel stable" in again.stdout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "ftp://x"}, r"must be dir:PATH, or http\(s\)://HOST"),
        ({"source": "dir:"}, "must be dir:PATH"),
        ({"source": "http://"}, "must be dir:PATH"),
        ({"source": "http://h:99999"}, "must be dir:PATH"),
        ({"source": "https://user:secret@h/x"}, "no user, password"),
        ({"source": "https://h/x?token=1"}, "no user, password"),
        ({"source": "https://h/\nx"}, "must be dir:PATH"),
        ({"window": "2-5"}, 'must be like "02:00-05:00"'),
        ({"days": ("someday",)}, "'someday' is no day"),
        ({"max_bytes_per_s": -1.0}, "must be 0 or more"),
        ({"window": "02:00-03:00", "check_interval_s": 7200.0}, "must be at most 3600"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        UpdateConfig(**values)


def test_sources_are_resolved_from_the_board_s_directory(tmp_path: Path):
    assert resolve_source("dir:a/../b", tmp_path) == tmp_path / "b"
    assert resolve_source("dir:/c", tmp_path) == Path("/c")
    assert resolve_source("https://h/x", tmp_path) == "https://h/x"
