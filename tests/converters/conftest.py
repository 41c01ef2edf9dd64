"""A tiny hybrid model, converted once per session, for every test of `converters`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from converters import coreml, tflite
from converters.prepare import DeployClassifier
from host.models.registry import create_model
from tests.converters.tiny import (
    INPUT_SHAPE,
    INPUT_SPEC,
    LABELS,
    MAX_CLASSES,
    make_images,
    make_model,
    randomize,
    write_coreml_forms,
)


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return make_images(48)


@pytest.fixture(scope="session")
def reference(model: nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """What PyTorch answers: features [N, D] and logits [N, K]."""
    with torch.no_grad():
        return {name: value.numpy() for name, value in DeployClassifier(model)(torch.from_numpy(images)).items()}


@pytest.fixture(scope="session")
def artifacts(model: nn.Module, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """TFLite files by precision: float32, float16, static, dynamic."""
    directory = tmp_path_factory.mktemp("tflite")
    float32 = tflite.convert_float(model, INPUT_SHAPE, MAX_CLASSES, directory / "float32.tflite", input_spec=INPUT_SPEC)
    return {
        "float32": float32,
        "float16": tflite.halve_weights(float32, directory / "float16.tflite"),
        "static": tflite.quantize_static(float32, images[:32], directory / "static.tflite"),
        "dynamic": tflite.quantize_dynamic(float32, directory / "dynamic.tflite"),
    }


@pytest.fixture(scope="session")
def package(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coreml") / "model.mlpackage"
    return coreml.convert(model, INPUT_SHAPE, path, input_spec_metadata=INPUT_SPEC, labels=LABELS)


@pytest.fixture(scope="session")
def forms(model: nn.Module, package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The other forms of the Core ML package, by name."""
    return write_coreml_forms(model, package, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifacts again, made by another process with another hash seed."""
    directory = tmp_path_factory.mktemp("rebuilt")
    subprocess.run(
        [sys.executable, "-c", f"from tests.converters.tiny import *; write_artifacts(Path({str(directory)!r}))"],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        timeout=240,
    )
    return directory


@pytest.fixture(scope="session")
def field_model() -> nn.Module:
    """The model of the quickstart, with random weights."""
    model = create_model("efficientformer", "field-32", num_classes=10, in_chans=1)
    return randomize(model, make_images(64, size=32)).deploy()
