"""Broker faults and malformed input at about a twentieth of the published scale, and what their tables are made of."""

import random

import pytest

from bench import broker_faults, fuzz
from bench.broker_faults import FAULTS, count_row
from bench.fuzz_inputs import json_inputs, text_inputs
from bench.jobs import run_jobs
from host.monitor.broker import find_mosquitto


def test_losses_copies_and_disorder_are_counted():
    put = {"a": 5, "b": 3}
    arrived = {"a": [1, 2, 4, 3, 4], "b": [1, 2, 3, 4]}  # a kill hid the last number of b from us
    assert count_row(put, arrived, dropped=0) == {
        "messages": 8,
        "boots": 2,
        "dropped_and_counted": 0,
        "lost": 1,
        "duplicates": 1,
        "reordered": 1,
    }
    assert count_row(put, arrived, dropped=1)["lost"] == 0


def test_the_published_scale_is_what_was_asked_for():
    jobs = broker_faults.list_jobs()
    assert sum(job.settings["messages"] for job in jobs) >= 100_000
    assert sum(job.settings["faults"] for job in jobs) >= 50
    assert sum(job.settings["inputs"] for job in fuzz.list_jobs()) >= 100_000
    assert sum(fuzz.SHARES.values()) == pytest.approx(1)


def test_inputs_repeat_and_differ():
    def first(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        makes = json_inputs([{"a": [1, "x"]}], rng), text_inputs(["a = 1\n[b]\nc = 2"], rng)
        return [make() for _ in range(200) for make in makes]

    assert first(1) == first(1) != first(2)
    assert len(set(first(1))) > 250


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_little_of_every_target(target, monkeypatch):
    monkeypatch.setattr("device.spool.SYNCHRONOUS", "OFF")
    (job,) = [job for job in fuzz.list_jobs(inputs=600) if job.key["target"] == target]
    row = fuzz.measure(job)
    assert (row["crashes"], row["hangs"]) == (0, 0)
    assert 0 < row["refused"] <= row["inputs"]


@pytest.mark.slow
def test_no_malformed_input_crashes_hangs_or_grows(tmp_path):
    from dataclasses import replace

    table = replace(fuzz.TABLE, directory=tmp_path)
    rows = run_jobs(table, fuzz.list_jobs(inputs=6000), fuzz.measure, workers=2)  # processes without our own memory
    assert {(row["crashes"], row["hangs"]) for row in rows} == {(0, 0)}
    assert max(row["memory_growth_mb"] for row in rows) < 10


@pytest.mark.slow
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho forgets sockets it cannot secure
@pytest.mark.parametrize("name", FAULTS)
def test_faults_lose_nothing_and_leave_the_order(name):
    (job,) = [job for job in broker_faults.list_jobs(messages=5000, faults=1, rate=100) if job.key["fault"] == name]
    row = broker_faults.measure(job)
    assert row["messages"] >= 625
    assert (row["lost"], row["duplicates"], row["reordered"]) == (0, 0, 0)
