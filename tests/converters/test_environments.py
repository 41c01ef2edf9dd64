"""Environments beside our own: found when finished, missed with the make target."""

import pytest

from converters.environments import LEGACY, ONNX2TF
from converters.errors import ConversionError, MissingEnvironmentError
from tests.support.environments import without_environments, write_interpreter


def test_a_missing_environment_is_named_with_its_make_target(tmp_path, monkeypatch):
    without_environments(monkeypatch, tmp_path)
    assert ONNX2TF.find() is None
    with pytest.raises(MissingEnvironmentError, match=r"onnx2tf with TensorFlow is not installed .* make onnx2tf-env"):
        ONNX2TF.require()
    with pytest.raises(ConversionError, match=r"\.venv-legacy in .* make legacy-env"):
        LEGACY.require()


def test_a_finished_environment_is_found_and_one_under_way_is_not(tmp_path, monkeypatch):
    without_environments(monkeypatch, tmp_path)
    python = write_interpreter(LEGACY, tmp_path, "exit 0")
    assert LEGACY.require() == python
    (tmp_path / LEGACY.directory / ".stamp").unlink()
    assert LEGACY.find() is None


def test_an_environment_without_its_interpreter_is_missing(tmp_path, monkeypatch):
    without_environments(monkeypatch, tmp_path)
    write_interpreter(ONNX2TF, tmp_path, "exit 0").unlink()
    with pytest.raises(MissingEnvironmentError, match="make onnx2tf-env"):
        ONNX2TF.require()
