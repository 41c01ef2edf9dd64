"""The agent's cost and its soak, in seconds and on a tiny model; and that a planted leak is found."""

import random
from pathlib import Path

import pytest

from bench import agent_overhead, soak
from bench.agent_overhead import RECONNECT, STEADY, UPDATE, Bench, list_jobs, measure
from bench.agent_setting import Feeder, Setting
from bench.install_sizes import device_packages
from bench.moments import FRAMES_KEPT, Moments
from bench.random_bundles import RandomModel
from bench.soak import Sample, Tally, is_flat, row_of, theil_sen
from host.monitor.broker import find_mosquitto
from tests.support.agent import DEVICE_PYTHON
from tests.support.tiny_bundle import LABELS, LEARNING, SPEC, bundle_files, convert_tiny_model

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
QUICK = {
    STEADY: {"pairs": 1, "seconds": 0.5},
    UPDATE: {"cycles": 1, "calm_s": 0.5},
    RECONNECT: {"cycles": 1, "calm_s": 0.5},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RandomModel:
    files = bundle_files(convert_tiny_model(tmp_path_factory.mktemp("tiny")))
    wanted = ("model.int8.tflite", "head.npz", "golden.npz")
    return RandomModel("tiny", SPEC, LABELS, LEARNING, {name: files[name] for name in wanted})


def quick_row(model: RandomModel, monkeypatch: pytest.MonkeyPatch, phase: str) -> dict:
    monkeypatch.setattr(agent_overhead, "random_models", lambda name: (model, model))
    return dict(measure(next(job for job in list_jobs(QUICK) if job.key["measured"] == phase)))


def test_moments_are_read_as_they_were_written_or_not_at_all(tmp_path: Path):
    written, read = Moments.create(tmp_path / "m"), Moments(tmp_path / "m")
    for number in range(FRAMES_KEPT + 5):
        written.add(number, number + 0.5)
    assert read.count == FRAMES_KEPT + 5
    assert read.since(FRAMES_KEPT + 3) == [(number, number + 0.5) for number in (FRAMES_KEPT + 3, FRAMES_KEPT + 4)]
    with pytest.raises(ValueError, match="frames 5 to 5 are gone"):
        read.since(5)


@needs_mosquitto
def test_agent_and_bare_loop_in_turn(model, monkeypatch):
    row = quick_row(model, monkeypatch, STEADY)
    assert 0.05 < row["throughput_ratio"] < 2
    assert row["agent_rss_mb"] == pytest.approx(row["bare_rss_mb"] + row["extra_rss_mb"], abs=0.2)
    assert 0 < row["extra_rss_mb"] < 60
    assert 0.05 < row["bare_start_s"] < row["agent_start_s"]


@pytest.mark.slow
@needs_mosquitto
def test_an_update_is_seen_from_request_to_confirmation(model, monkeypatch):
    row = quick_row(model, monkeypatch, UPDATE)
    assert row["frames"] > 50
    assert row["p99_over_p50"] >= 1
    assert row["longest_period_ms"] >= row["p99_over_p50"] * 0.01


@pytest.mark.slow
@needs_mosquitto
def test_a_reconnect_is_seen_until_the_agent_is_back(model, monkeypatch):
    row = quick_row(model, monkeypatch, RECONNECT)
    assert row["seconds_each"] > agent_overhead.AWAY_S
    assert row["frames"] > 50


@pytest.mark.skipif(not DEVICE_PYTHON.exists(), reason="there is no .venv-device; make device-env")
def test_what_is_installed_is_listed_by_package():
    sizes = device_packages()
    assert {"numpy", "ai_edge_litert", "paho", "tuf", "securesystemslib"} <= sizes.keys()
    assert not {"pip", "setuptools", "torch"} & sizes.keys()
    assert sum(sizes.values()) < 170e6


def test_a_slope_stands_against_outliers_and_knows_what_it_does_not_know():
    rng = random.Random(0)
    x = list(range(60))
    noisy = [100 + 0.5 * second + rng.gauss(0, 1) + (300 if second % 20 == 7 else 0) for second in x]
    slope = theil_sen(x, noisy)
    assert slope.low < 0.5 < slope.high
    assert slope.value == pytest.approx(0.5, abs=0.05)
    flat = theil_sen(x, [100 + rng.gauss(0, 1) for _ in x])
    assert flat.low < 0 < flat.high


def samples(*, leak_mb_per_h: float = 0, descriptors_at_end: int = 12, threads_at_end: int = 6) -> list[Sample]:
    rng = random.Random(1)
    return [
        Sample(
            seconds=10.0 * number,
            rss_mb=100 + leak_mb_per_h * number / 360 + rng.gauss(0, 0.5),
            pss_mb=90 + rng.gauss(0, 0.5),
            descriptors=12 if number < 200 else descriptors_at_end,
            threads=6 if number < 200 else threads_at_end,
            spool_mb=0.1,
            frames=100 * number,
        )
        for number in range(1, 360)
    ]


def test_an_hour_is_judged_by_slope_descriptors_and_threads():
    assert row_of(samples(), Tally())["is_flat"]
    assert not row_of(samples(leak_mb_per_h=6), Tally())["is_flat"]
    assert not row_of(samples(descriptors_at_end=13), Tally())["is_flat"]
    assert not row_of(samples(threads_at_end=7), Tally())["is_flat"]
    assert is_flat(samples(leak_mb_per_h=1), theil_sen([0, 1, 2], [0, 1, 2]))  # too little to matter


@pytest.mark.slow
@needs_mosquitto
@pytest.mark.parametrize("program", ["bench.timed_agent", "tests.support.leaky_agent"])
def test_a_leak_in_the_real_agent_is_found(model, tmp_path: Path, program: str):
    setting = Setting.create(tmp_path, (model, model))
    found, tally = soak.soak(Bench(setting, Feeder(setting.frames, model)), 45, sample_s=1.0, pace=12, program=program)
    row = row_of(found, tally)
    assert min(row["updates"], row["lessons"], row["undone"], row["broker_restarts"]) > 0
    is_leaking = program != "bench.timed_agent"
    assert (row["rss_slope_low"] > 2000) == is_leaking
    assert (row["descriptors_last"] > row["descriptors_first"] + 20) == is_leaking


def test_published_settings_are_what_was_asked_for():
    assert {job.key["model"] for job in list_jobs()} == {*agent_overhead.MODELS, None}
    assert [job.settings["minutes"] for job in soak.list_jobs()] == [60.0, 60.0]
