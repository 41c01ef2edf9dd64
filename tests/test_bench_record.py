"""bench.record: the JSON and the table say the same, whole or not at all."""

import json
import platform
from datetime import date

import numpy as np
import pytest

from bench.record import write_results
from host.machine import describe_machine

MACHINE = {"cpu": "Cortex-A76", "cores": 4, "memory_gb": 8.0, "os": "Debian, aarch64", "python": "3.11.2"}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="latency", **changes):
        known = {"command": "make evidence-latency", "seed": 0, "data": "100 photos", "title": "Latency"}
        known |= {"machine": MACHINE, "today": lambda: date(2026, 11, 23), "directory": tmp_path}
        return write_results(name, rows=rows, **(known | changes))

    return write


def test_table_and_json_hold_the_same_rows(write):
    table = write([{"model": "vit", "p50_ms": 3.14159}, {"model": "deit", "p50_ms": 41, "fits": True}])
    record = json.loads(table.with_suffix(".json").read_text())
    assert list(record) == ["command", "machine", "date", "seed", "data", "rows"]
    assert record["rows"] == [{"model": "vit", "p50_ms": 3.14159}, {"model": "deit", "p50_ms": 41, "fits": True}]
    assert record["date"] == "2026-11-23"
    assert table.read_text() == (
        "# Latency\n\n"
        "| model | p50_ms | fits |\n| --- | --- | --- |\n| vit | 3.142 | – |\n| deit | 41 | yes |\n\n"
        "Measured 2026-11-23 by `make evidence-latency`, seed 0. Data: 100 photos. "
        "Machine: Cortex-A76, cores 4, memory_gb 8.0, Debian, aarch64, python 3.11.2.\n"
    )


def test_notes_follow_the_table_and_cells_cannot_break_it(write):
    text = write([{"op": "a|b\nc"}], notes="\nNot reached: x.\n", seed=None).read_text()
    assert "| a\\|b c |" in text
    assert "no seed" in text
    assert text.endswith("\n\nNot reached: x.\n")


def test_numpy_scalars_are_numbers(write):
    record = json.loads(write([{"p50_ms": np.float64(1.5), "runs": np.int64(3)}]).with_suffix(".json").read_text())
    assert record["rows"] == [{"p50_ms": 1.5, "runs": 3}]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "'latency' have no rows"),
        ([{"p50_ms": float("nan")}], {}, "latency: p50_ms is nan; leave the cell None"),
        ([{"p50_ms": [1]}], {}, "latency: p50_ms must be a string, number, boolean or None, got list"),
        ([{"p50_ms": 1}], {"name": "../x"}, "lower-case letters, digits, _ and -, got '../x'"),
    ],
)
def test_what_is_no_result_is_refused_and_leaves_the_old_one(write, tmp_path, rows, changes, message):
    write([{"p50_ms": 1.0}])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("../", r"\.\./")):
        write(rows, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"latency.json", "latency.md"}  # no temporary file stays


def test_a_failed_write_leaves_the_old_result(write, tmp_path, monkeypatch):
    table = write([{"p50_ms": 1.0}])
    before = table.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write([{"p50_ms": 2.0}])
    assert table.read_text() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_machine_is_described_without_its_name():
    machine = describe_machine()
    assert set(machine) == {"cpu", "cores", "memory_gb", "os", "python"}
    assert machine["cores"] >= 1
    assert machine["memory_gb"] > 0
    assert all(machine.values())
    assert not any(str(value) == platform.node() for value in machine.values())
