"""Every board profile loads, says where its figures are from, and fits itself."""

import re
import tomllib
from pathlib import Path

import pytest

from device.contract.board import board_names, load_board, parse_board
from device.contract.errors import ConfigError
from host.quantize.spec import PRECISIONS

PROFILES = Path(__file__).parents[1] / "firmware_configs"
PROMISED = {
    "raspberry-pi-zero-2w",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "jetson-orin-nano",
    "coral-dev-board",
    "imx8mp",
    "rk3588",
    "generic-x86-64",
    "android-arm64",
    "iphone-12",
    "iphone-15",
}


@pytest.fixture(params=board_names())
def board(request):
    return load_board(request.param)


def test_the_promised_boards_are_there():
    assert not PROMISED - set(board_names())


def test_only_profiles_lie_beside_the_profiles():
    assert {path.stem for path in PROFILES.iterdir() if path.suffix == ".toml"} == set(board_names())
    assert {path.suffix for path in PROFILES.iterdir() if path.is_file()} == {".toml"}


def test_each_group_of_figures_names_its_source(board):
    assert set(board.sources) == {"hardware", "support", "budget", "runtime"}
    assert all(len(source.split()) >= 5 for source in board.sources.values())
    for ours in ("budget", "runtime"):
        assert board.sources[ours].startswith(("Chosen by FieldViT: ", "Measured on "))


def test_file_opens_with_the_command_that_uses_it(board):
    comments = (PROFILES / f"{board.name}.toml").read_text(encoding="utf-8").split("\nname =")[0].splitlines()
    assert all(line.startswith("#") for line in comments)
    assert any("`fieldvit boards`" in line for line in comments)
    assert any(f"`fieldvit flash --board {board.name}`" in line for line in comments)


def test_budgets_fit_the_board(board):
    budget, hardware = board.budget, board.hardware
    assert 0 < budget.artifact_bytes < budget.peak_memory_mb * 2**20 < hardware.memory_mb * 2**20
    assert budget.latency_ms > 0
    assert 40 <= budget.soc_temp_celsius <= 100


def test_runtime_defaults_fit_the_board(board):
    runtime = board.runtime
    assert 1 <= runtime.threads <= board.hardware.cores
    assert runtime.feature_ring >= 64
    assert 2**20 <= runtime.spool_bytes <= 256 * 2**20
    assert runtime.spool_age_s >= 24 * 3600
    assert 1 <= runtime.telemetry_interval_s <= 3600
    assert runtime.soak_frames > 0
    assert runtime.soak_s > 0


def test_a_week_without_network_fits_the_spool_where_the_source_says_so(board):
    size = re.search(r"a week of outage .* ([\d.]+) kB a message", board.sources["runtime"])
    if size:
        messages = 7 * 24 * 3600 / board.runtime.telemetry_interval_s
        assert messages * float(size[1]) * 1000 <= board.runtime.spool_bytes


def test_support_uses_known_words(board):
    support = board.support
    assert set(support.precisions) <= set(PRECISIONS)
    assert board.runtime.delegate == ("coreml" if "coreml" in support.formats else "xnnpack")
    assert support.max_tensor_rank == 5
    assert board.hardware.arch in {"aarch64", "x86_64", "arm64"}
    assert ("coreml" in support.formats) == board.name.startswith("iphone")
    assert support.minimum_ios is None or f"iOS {support.minimum_ios} or later" == board.hardware.os


def test_desktop_profile_leaves_room_for_the_quickstart():
    board = load_board("generic-x86-64")
    assert board.budget.artifact_bytes == 64 * 2**20
    assert board.budget.latency_ms == 200
    assert board.budget.peak_memory_mb == 512
    assert board.support.precisions == PRECISIONS
    assert board.runtime.telemetry_interval_s == 2
    assert (board.runtime.soak_frames, board.runtime.soak_s) == (50, 5)


def test_unknown_board_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"'toaster' is unknown; choose one of .*raspberry-pi-5"):
        load_board("toaster")


@pytest.mark.parametrize(("name", "minimum_ios"), [("raspberry-pi-5", 17), ("iphone-12", None)])
def test_an_ios_goes_with_core_ml(name, minimum_ios):
    table = _table(name)
    support = {**table["support"], "minimum_ios": minimum_ios}
    with pytest.raises(ConfigError, match=rf"minimum_ios goes with the format coreml: .* minimum_ios is {minimum_ios}"):
        parse_board(name, {**table, "support": support})


def test_profile_under_another_name_is_refused():
    with pytest.raises(ConfigError, match=r"name is 'b', expected 'a'"):
        parse_board("a", {**_table("raspberry-pi-5"), "name": "b"})


def _table(name):
    return tomllib.loads((PROFILES / f"{name}.toml").read_text(encoding="utf-8"))
