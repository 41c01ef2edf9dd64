"""TFLite files in the interpreters of other environments: the same answers, and errors that name the runtime."""

import sys
from pathlib import Path

import numpy as np
import pytest

from converters import flatbuffer
from converters.environments import LEGACY, ONNX2TF
from converters.errors import ConversionError
from converters.isolate import opened
from converters.runners import open_features, open_in_litert, open_in_tensorflow, open_in_tflite_runtime
from tests.support.environments import needs_legacy, needs_onnx2tf

FLOAT_LIMIT, INT8_LIMIT = 1e-5, 0.08
"""Shares of the largest feature: rounding of float32; a few int8 steps, which other kernels round otherwise."""


def answers(opener, path, images, python=None):
    with opened(opener, path, python=python) as answer:
        return answer(images)


def require_equal(artifacts, images, opener, python):
    for precision, limit in {"float32": FLOAT_LIMIT, "float16": FLOAT_LIMIT, "static": INT8_LIMIT}.items():
        expected = answers(open_in_litert, artifacts[precision], images)
        found = answers(opener, artifacts[precision], images, python)
        assert np.abs(found - expected).max() <= limit * np.abs(expected).max(), precision


def test_an_interpreter_named_by_its_path_answers_as_our_own(artifacts, images):
    path = artifacts["float32"]
    expected = answers(open_features, path, images[:4])
    np.testing.assert_array_equal(answers(open_in_litert, path, images[:4], Path(sys.executable)), expected)


def test_a_file_that_a_runtime_cannot_load_is_named_with_it(tmp_path):
    path = tmp_path / "bad.tflite"
    path.write_bytes(b"no model")
    with pytest.raises(ConversionError, match=r"bad\.tflite: LiteRT cannot run it"):
        answers(open_in_litert, path, None)


def test_a_file_without_a_known_signature_is_refused(artifacts, tmp_path):
    path, model = tmp_path / "other.tflite", flatbuffer.read_model(artifacts["float32"])
    for definition in model.signatureDefs:
        definition.signatureKey = b"other_" + definition.signatureKey
    flatbuffer.write_model(model, path)
    with pytest.raises(ConversionError, match="has no signature features or serving_default"):
        answers(open_in_litert, path, None)


@needs_legacy
def test_tflite_runtime_answers_as_litert(artifacts, images):
    require_equal(artifacts, images, open_in_tflite_runtime, LEGACY.require())


@needs_onnx2tf
@pytest.mark.slow
def test_tensorflow_answers_as_litert(artifacts, images):
    require_equal(artifacts, images, open_in_tensorflow, ONNX2TF.require())
