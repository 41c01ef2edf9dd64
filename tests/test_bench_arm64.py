"""The device on ARM: its wheels as pip resolves them, how a report is counted, and a tiny model that is handed over."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bench.arm64 import check_wheels, summarize
from bench.arm64_outputs import golden_outputs
from bench.arm64_wheels import PYTHONS, ROOT, WheelsError, device_requirements, resolve_wheels
from device.contract.bundle import extract
from tests.support.tiny_bundle import convert_tiny_model, ready_tiny_model, save_tiny_model, write_bundle

CONSTRAINTS = ROOT / "constraints" / "device.txt"


def has_index() -> bool:
    """Whether pip can ask its index: resolving needs one, and not each machine has one."""
    try:
        resolve_wheels(["tuf"], PYTHONS[0], constraints=CONSTRAINTS)
    except WheelsError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_device_extra_has_wheels_for_arm(python: str):
    if not has_index():
        pytest.skip("pip has no index here")
    wheels = resolve_wheels(device_requirements(), python, constraints=CONSTRAINTS)
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    assert {name.replace("_", "-").replace(".", "-").lower() for name in pinned} == wheels.keys()
    tag = python.replace(".", "")
    assert f"-cp{tag}-cp{tag}-" in wheels["ai-edge-litert"]
    assert wheels["ai-edge-litert"].endswith("aarch64.whl")
    assert check_wheels(python)["passed"] == len(wheels)


@pytest.mark.slow
def test_what_has_no_wheel_is_named():
    if not has_index():
        pytest.skip("pip has no index here")
    with pytest.raises(WheelsError, match=r"Python 3\.13, aarch64: .*tflite-runtime"):
        resolve_wheels(["tflite-runtime"], "3.13", constraints=CONSTRAINTS)


def test_a_report_is_counted_by_outcome_with_names_and_reasons():
    report = ElementTree.fromstring(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><error/>'
        '</testcase><testcase name="d"><skipped message="no systemd"/></testcase></testsuite></testsuites>'
    )
    row = summarize(report)
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 2, 1)
    assert row["detail"] == "failed: b, c; skipped 1: no systemd"


def test_a_tiny_model_that_was_handed_over_is_the_same(tmp_path: Path, monkeypatch):
    tiny_model = convert_tiny_model(tmp_path)
    save_tiny_model(tiny_model, tmp_path / "tiny-0.npz")
    monkeypatch.setenv("FIELDVIT_TINY_MODELS", str(tmp_path))
    ready = ready_tiny_model()
    extract(write_bundle(tmp_path, ready), tmp_path / "slot")
    outputs = golden_outputs(tmp_path / "slot")
    np.testing.assert_array_equal(outputs["int8/features"], tiny_model.golden["int8/features"])
    np.testing.assert_array_equal(outputs["int8/answers"], tiny_model.golden["int8/logits"].argmax(axis=1))
