"""Environments beside our own, as tests have them: the real ones where they were made, none, or a stand-in's error."""

from pathlib import Path

import pytest

from converters import environments
from converters.environments import LEGACY, ONNX2TF, Environment


def needs(environment: Environment) -> pytest.MarkDecorator:
    """Skip where an environment was not made, and say how to make it."""
    reason = f"{environment.holds} is not installed; make {environment.target}"
    return pytest.mark.skipif(environment.find() is None, reason=reason)


needs_onnx2tf, needs_legacy = needs(ONNX2TF), needs(LEGACY)


def without_environments(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Look for environments in this directory only."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(environments, "_CHECKOUT", directory)


def write_interpreter(environment: Environment, directory: Path, script: str) -> Path:
    """An environment whose interpreter is this shell script."""
    python = directory / environment.directory / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (directory / environment.directory / ".stamp").touch()
    return python
