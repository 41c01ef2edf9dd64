"""The quickstart's short form, for real: training, conversion, board, broker, lesson, attacks, report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from device.contract.bundle import read_manifest
from host.bundle_checks import verify_bundle
from host.cli import main
from host.errors import HostError
from host.layer_table import draw_layers, layer_rows, layer_summary
from host.quickstart.processes import find_device_python
from tests.support.quickstart import NAME, run_quickstart_verb

KEYS = {
    "base_accuracy_float",
    "base_accuracy_int8",
    "all_accuracy_before",
    "all_accuracy_after",
    "old_classes_drop",
    "tflite_argmax_agreement",
    "coreml_argmax_agreement",
    "bad_updates_refused",
    "seconds",
}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    try:
        find_device_python(None)
    except HostError as error:
        pytest.skip(str(error))
    runs = tmp_path_factory.mktemp("quickstart") / "runs"
    done = run_quickstart_verb(runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return runs / NAME, done


@pytest.fixture(scope="module")
def bundle(short_run):
    (path,) = (short_run[0] / "export").glob("*.fieldvit")
    return path


def test_metrics_hold_what_was_measured(short_run):
    metrics = json.loads((short_run[0] / "metrics.json").read_text())
    assert metrics.keys() >= KEYS
    assert metrics["tflite_argmax_agreement"] == 1.0
    assert metrics["coreml_argmax_agreement"] >= 0.995
    assert metrics["bad_updates_refused"] == 1.0
    assert metrics["agent_modules_ok"] is True
    assert metrics["all_accuracy_after"] > metrics["all_accuracy_before"]  # the board has learned something


def test_summary_has_ten_lines(short_run):
    assert len(short_run[1].stdout.strip().splitlines()) == 10


def test_report_needs_nothing_from_outside(short_run):
    report = (short_run[0] / "report.html").read_text()
    assert report.count("<svg") == 4
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|data:)[^"]*"', report)
    assert all(kind in report for kind in ("installed", "confirmed", "learned", "refused"))


def test_second_run_uses_the_finished_stages_and_repeats_the_bundle(short_run, bundle):
    before = bundle.read_bytes()
    stamp = (short_run[0] / "train" / "stamp.json").stat().st_mtime_ns
    code = "import sys; from host.cli import main; sys.exit(main(sys.argv[1:]))"
    recipe = short_run[0].parent / "short.toml"
    recipe.write_text(_recipe_text(bundle))
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(recipe), "--runs", str(short_run[0].parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (short_run[0] / "train" / "stamp.json").stat().st_mtime_ns == stamp
    assert bundle.read_bytes() == before


def test_bundle_verifies_against_pytorch_and_without_the_run(short_run, bundle, tmp_path):
    report = verify_bundle(bundle, short_run[0].parent, with_layers=True)
    report.require_passed()
    assert [found.artifact for found in report.layers] == ["int8", "float32", "infer", "coreml"]
    assert not any(found.first_departed for found in report.layers)
    assert "PyTorch" in report.reference
    assert {check.artifact for check in report.checks} == {"int8", "float32", "infer", "coreml"}
    drawing = draw_layers(report.layers, bundle, tmp_path)
    assert drawing.read_text().startswith("<svg")
    assert {row[0] for row in layer_rows(report.layers)} == {"int8", "float32", "infer", "coreml"}
    assert "float32: no tensor departs from PyTorch" in layer_summary(report)
    alone = verify_bundle(bundle, tmp_path)
    alone.require_passed()
    for artifact in ("float32", "coreml"):
        assert any(f"{artifact}: its tensors were compared with nothing" in line for line in layer_summary(alone))
    assert "own float32 file" in alone.reference
    assert [check.artifact for check in alone.checks if check.is_reference] == ["float32"]


def test_bench_measures_every_artifact(capsys, bundle):
    assert main(["bench", str(bundle), "--queries", "50", "--json"]) == 0
    rows, manifest = json.loads(capsys.readouterr().out)["rows"], read_manifest(bundle)
    assert [row["artifact"] for row in rows] == [artifact.precision for artifact in manifest.artifacts]
    assert [row["accuracy"] for row in rows] == pytest.approx([artifact.accuracy for artifact in manifest.artifacts])
    assert all(row["peak_memory_bytes"] > row["artifact_bytes"] for row in rows)
    assert [row["partitions"] for row in rows] == [1, 1]


def _recipe_text(bundle: Path) -> str:
    """The recipe in the bundle's provenance, as TOML."""
    table = read_manifest(bundle).provenance["recipe"]
    return "\n".join(f"{key} = {_toml(value)}" for key, value in _stated(table)) + "\n"


def _stated(table: dict) -> list[tuple[str, object]]:
    """Without what is None, which TOML cannot say."""
    return [(key, value) for key, value in table.items() if value is not None]


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in _stated(value)) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
