"""`fieldvit verify --second-route` and `--runtimes`: what they say of absent environments, and of differences."""

import numpy as np
import pytest

from converters.errors import MissingEnvironmentError, ParityError
from host.bundle_checks import VerifyReport, verify_bundle
from host.cli import main
from host.cross_checks import CROSS_COLUMNS, CrossCheck, check_runtimes, compared
from tests.support.bundles import make_manifest, write_plain_bundle
from tests.support.environments import without_environments


def report_of(*checks):
    return VerifyReport(bundle="b", reference="r", images=1, checks=(), layers=(), cross_checks=checks)


def test_absent_runtimes_are_said_once_each_and_fail_nothing(tmp_path, monkeypatch):
    without_environments(monkeypatch, tmp_path)
    checks = check_runtimes({}, make_manifest(), None)
    assert [(check.artifact, check.checked_with) for check in checks] == [("all", "tflite-runtime"), ("all", "tf.lite")]
    assert all("not run: " in check.row()[-1] for check in checks)
    assert "make legacy-env" in checks[0].row()[-1]
    assert "make onnx2tf-env" in checks[1].row()[-1]
    report_of(*checks).require_passed()


def test_the_second_route_without_its_environment_is_one_line(tmp_path, monkeypatch, capsys):
    bundle = write_plain_bundle(tmp_path / "plain-0.1.0.fieldvit")
    without_environments(monkeypatch, tmp_path)
    with pytest.raises(MissingEnvironmentError, match="make onnx2tf-env"):
        verify_bundle(bundle, tmp_path, second_route=True)
    assert main(["verify", str(bundle), "--second-route"]) == MissingEnvironmentError.exit_code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.endswith("make it with: make onnx2tf-env")


@pytest.mark.parametrize(("shift", "is_problem"), [(0.0, False), (0.9e-4, False), (1.2e-4, True)])
def test_the_difference_is_a_share_of_the_largest_value(shift, is_problem):
    expected = np.array([[2.0, -4.0], [1.0, 0.0]])
    check = compared("float32", "other", expected, expected + 4 * shift, allowed=1e-4)
    assert check.difference == pytest.approx(shift, abs=1e-12)
    assert bool(check.problem) == is_problem
    assert len(check.row()) == len(CROSS_COLUMNS)


@pytest.mark.parametrize("found", [np.full((2, 2), np.nan), np.zeros((2, 3))])
def test_nan_and_other_shapes_are_problems(found):
    assert compared("float32", "other", np.ones((2, 2)), found, allowed=1.0).problem


def test_a_problem_fails_the_bundle_and_is_named():
    check = CrossCheck(artifact="int8", checked_with="tf.lite", allowed=0.1, problem="tf.lite cannot run it")
    with pytest.raises(ParityError, match=r"int8 in tf\.lite: tf\.lite cannot run it; do not ship"):
        report_of(check).require_passed()
