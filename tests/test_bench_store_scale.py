"""The table of the store's scale, at a small one: every figure is there and of the right order."""

from dataclasses import replace

import pytest

from bench.jobs import run_jobs
from bench.store_scale import POSTGRES, SQLITE, TABLE, Scale, list_jobs, measure

COLUMNS = {
    *("messages_per_s", "devices_s", "history_messages", "timeline_24h_s", "timeline_30d_s"),
    *("mb_per_million_as_it_came", "mb_per_million_rolled_up"),
}


@pytest.mark.parametrize("store", [SQLITE, pytest.param(POSTGRES, marks=pytest.mark.slow)])
def test_a_store_is_measured_and_a_rollup_is_smaller(store, tmp_path):
    if store == POSTGRES:
        pytest.importorskip("psycopg")
    jobs = [job for job in list_jobs(Scale(devices=20, rounds=3, days=0.1, repeats=1)) if job.key["store"] == store]
    (row,) = run_jobs(replace(TABLE, directory=tmp_path), jobs, measure)
    assert row.keys() >= COLUMNS
    assert all(row[name] > 0 for name in COLUMNS)
    assert row["mb_per_million_rolled_up"] < row["mb_per_million_as_it_came"]
    assert "864 messages of one device" in (tmp_path / "store_scale.md").read_text()
