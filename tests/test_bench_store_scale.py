"""The table of the store's scale, at a small one: every figure is there and of the right order."""

from dataclasses import replace

import pytest

from bench.jobs import run_jobs
from bench.store_scale import TABLE, Scale, list_jobs, measure
from tests.support.postgres import find_postgres

COLUMNS = {
    *("messages_per_s", "devices_s", "history_messages", "timeline_24h_s", "timeline_30d_s"),
    *("mb_per_million_as_it_came", "mb_per_million_rolled_up"),
}


@pytest.mark.skipif(find_postgres() is None, reason="PostgreSQL is not installed")
def test_both_stores_are_measured_and_a_rollup_is_smaller(tmp_path):
    pytest.importorskip("psycopg")
    jobs = list_jobs(Scale(devices=20, rounds=3, days=0.5, repeats=1))
    rows = run_jobs(replace(TABLE, directory=tmp_path), jobs, measure)
    assert [row["store"] for row in rows] == ["SQLite", "PostgreSQL"]
    for row in rows:
        assert row.keys() >= COLUMNS
        assert all(row[name] > 0 for name in COLUMNS)
        assert row["mb_per_million_rolled_up"] < row["mb_per_million_as_it_came"]
    assert "4320 messages of one device" in (tmp_path / "store_scale.md").read_text()
