"""Foreign files in a process of their own: answers and errors come back, a death is named."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters import flatbuffer
from converters.errors import ConversionError
from converters.isolate import opened
from converters.runners import open_features
from device.contract.errors import EngineError


def open_echo(path: Path) -> Callable[..., object]:
    return lambda *arguments: (path.name, os.getpid(), *arguments)


def open_killer(path: Path) -> Callable[[int], None]:
    return lambda number: os.kill(os.getpid(), number)


def test_calls_are_answered_by_one_other_process(tmp_path):
    with opened(open_echo, tmp_path / "file") as call:
        name, process, value = call(3)
        assert (name, value) == ("file", 3)
        assert process not in (os.getpid(), None)
        assert call()[1] == process


def test_errors_come_back_as_they_are(tmp_path):
    with (
        pytest.raises(EngineError, match="ai-edge-litert cannot load it"),
        opened(open_features, tmp_path / "no.tflite"),
    ):
        pass


def test_a_death_during_a_call_is_named(tmp_path):
    with (
        pytest.raises(ConversionError, match=r"file: killed the process .* \(SIGSEGV\)"),
        opened(open_killer, tmp_path / "file") as call,
    ):
        call(signal.SIGSEGV)


def test_a_file_that_aborts_litert_is_named(artifacts, tmp_path):
    path = tmp_path / "aborts.tflite"
    write_aborting(artifacts["static"], path)
    killed = pytest.raises(ConversionError, match=r"aborts.tflite: killed the process .* \(SIGABRT\)")
    with killed, opened(open_features, path):
        pass


def write_aborting(path: Path, out: Path) -> None:
    """A sum whose scale its kernel cannot express: LiteRT checks this with an abort."""
    model = flatbuffer.read_model(path)
    graph = model.subgraphs[0]
    for operator in graph.operators:
        tensor = graph.tensors[operator.outputs[0]]
        if flatbuffer.operator_name(model, operator) == "ADD" and tensor.quantization.scale is not None:
            tensor.quantization.scale = np.array([1e-12], np.float32)
            break
    flatbuffer.write_model(model, out)
