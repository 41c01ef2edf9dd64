"""The table `two_routes`: every family is in it, and one small model is measured as all are."""

import numpy as np
import pytest

from bench import two_routes
from bench.jobs import Job
from host.errors import BenchError
from host.models.registry import list_models
from tests.support.environments import needs_onnx2tf, without_environments


def test_every_family_has_one_row():
    assert sorted(name.split("/")[0] for name in two_routes.SMALL) == sorted({entry.family for entry in list_models()})


def test_a_difference_is_a_share_of_the_largest_value():
    assert two_routes.difference(np.array([[-4.0, 1.0]]), np.array([[-4.0, 1.0004]])) == 1e-4


def test_without_the_second_route_nothing_is_measured(tmp_path, monkeypatch, capsys):
    without_environments(monkeypatch, tmp_path)
    with pytest.raises(BenchError, match="make onnx2tf-env"):
        two_routes.require_second_route()
    assert two_routes.main([]) == BenchError.exit_code
    assert capsys.readouterr().err.startswith("error: onnx2tf with TensorFlow is not installed")


@needs_onnx2tf
@pytest.mark.slow
def test_one_model_is_measured_by_both_routes():
    row = two_routes.measure(Job(key={"model": "cnn/small"}))
    assert row["litert"] == row["onnx2tf"] == "converts"
    assert row["verdict"] == "agree"
    assert max(row[f"{pair}_features"] for pair in ("routes", "litert_torch", "onnx2tf_torch")) < two_routes.LIMIT
