"""The counts of the suite under tflite-runtime are those of pytest's report, and a missing environment is said."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import legacy_runtime
from host.errors import BenchError

REPORT = ElementTree.fromstring(
    '<testsuites><testsuite><testcase classname="tests.device.test_a" name="x"/>'
    '<testcase classname="tests.device.test_a" name="y"><failure message="no"/></testcase>'
    '<testcase classname="tests.device.test_b" name="z"><skipped message="needs torch"/></testcase>'
    '<testcase classname="" name="tests.device.test_c"><error message="collection"/></testcase>'
    "</testsuite></testsuites>"
)


def test_outcomes_are_counted_by_module_and_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(legacy_runtime, "python_of", Path)
    monkeypatch.setattr(legacy_runtime, "runtime_of", lambda _: "tflite-runtime 2.14.0")
    table = legacy_runtime.record(REPORT, tmp_path)
    rows = json.loads((tmp_path / "legacy_runtime.json").read_text())["rows"]
    counts = {row["tests"]: (row["passed"], row["skipped"], row["failed"]) for row in rows}
    assert counts["all"] == (1, 1, 2)
    assert (counts["test_a"], counts["test_b"]) == ((1, 0, 1), (0, 1, 0))
    assert "Skipped: needs torch (1)." in table.read_text()


def test_a_missing_environment_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(legacy_runtime, "ROOT", tmp_path)
    with pytest.raises(BenchError, match=r"\.venv-legacy is not there; make test-legacy makes it"):
        legacy_runtime.run(tmp_path, processes=1)


def test_the_recorded_run_has_no_failure():
    rows = json.loads((legacy_runtime.RESULTS / "legacy_runtime.json").read_text())["rows"]
    (everything,) = (row for row in rows if row["tests"] == "all")
    assert everything["runtime"].startswith("tflite-runtime 2.14")
    assert (everything["failed"], everything["passed"] > 500) == (0, True)
