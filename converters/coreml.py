"""PyTorch to Core ML: an mlprogram package for iOS 17 and later, byte-identical for the same model in every process.

The package takes the same float32 NHWC image as the TFLite file and gives `features` [1, D] and `logits` [1, K] of the
base head, float16 inside. Nothing here runs on Linux; `converters.mil` evaluates the saved program instead.

coremltools writes the date, random identifiers, maps in hash order and a debug file; `canonicalise` undoes all four.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from converters.errors import ConversionError
from converters.flatbuffer import canonical_json
from converters.prepare import DeployClassifier, evaluating, feature_dim
from converters.quiet import quiet
from device.contract.files import sync_directory, write_atomic

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
_SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"
_MANIFEST = "Manifest.json"
_DATE_KEY = "com.github.apple.coremltools.conversion_date"


def convert(
    model: nn.Module,
    input_shape: tuple[int, int, int, int],
    path: Path,
    *,
    input_spec_metadata: Mapping[str, Any],
    labels: Sequence[str],
    is_half: bool = True,
) -> Path:
    """Convert a backbone with its base head to a `.mlpackage` directory, replacing an older one.

    Args:
        model: has `forward_features(images_nchw)` and `head(features)`; its mode is restored.
        input_shape: (1, H, W, C).
        path: the package directory, ending in `.mlpackage`.
        input_spec_metadata: pre-processing facts, stored as user metadata `fieldvit.input`.
        labels: class names in the order of the logits, stored as user metadata `fieldvit.labels`.
        is_half: compute in float16, as the Neural Engine does; else in float32, which takes CPU or GPU.

    Raises:
        ConversionError: the model does not fit, or coremltools refused it.
    """
    if path.suffix != ".mlpackage":
        raise ConversionError(f"{path}: a Core ML package must end in .mlpackage")
    feature_dim(model, input_shape)
    with quiet():
        import coremltools as ct

        package = _convert(ct, model, input_shape, is_half)
    package.user_defined_metadata["fieldvit.input"] = canonical_json(dict(input_spec_metadata)).decode()
    package.user_defined_metadata["fieldvit.labels"] = canonical_json(list(labels)).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as directory:
        temporary = Path(directory) / path.name
        package.save(str(temporary))
        canonicalise(temporary)
        shutil.rmtree(path, ignore_errors=True)  # a directory cannot be replaced by one rename
        temporary.replace(path)
    sync_directory(path.parent)
    return path


def read_metadata(path: Path, name: str = "fieldvit.input") -> Any:
    """Read one JSON entry of the user metadata back; None where there is none of that name."""
    text = read_specification(path).description.metadata.userDefined.get(name)
    return None if text is None else json.loads(text)


def canonicalise(package: Path) -> None:
    """Rewrite a saved package so that equal models are equal bytes: no date, fixed identifiers, sorted maps."""
    specification = read_specification(package)
    specification.description.metadata.userDefined.pop(_DATE_KEY, None)
    write_atomic(package / _SPECIFICATION, specification.SerializeToString(deterministic=True))
    manifest = json.loads((package / _MANIFEST).read_text())
    entries = manifest["itemInfoEntries"]
    identifiers = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper() for old, entry in entries.items()}
    manifest["itemInfoEntries"] = {identifiers[old]: entry for old, entry in entries.items()}
    manifest["rootModelIdentifier"] = identifiers[manifest["rootModelIdentifier"]]
    write_atomic(package / _MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    for extra in package.iterdir():  # such as executorch_debug_handle_mapping.json, which Core ML does not read
        if extra.is_file() and extra.name != _MANIFEST:
            extra.unlink()
    for file in (package / WEIGHTS, package / _SPECIFICATION, package / _MANIFEST):
        os.chmod(file, 0o644)


def _convert(ct: Any, model: nn.Module, input_shape: tuple[int, int, int, int], is_half: bool) -> Any:
    image = torch.zeros(input_shape)
    with evaluating(model):
        try:
            exported = torch.export.export(DeployClassifier(model).eval(), (image,)).run_decompositions({})
            return ct.convert(
                exported,
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=ct.precision.FLOAT16 if is_half else ct.precision.FLOAT32,
                inputs=[ct.TensorType("images", shape=tuple(input_shape), dtype=np.float32)],
                outputs=[ct.TensorType("features", dtype=np.float32), ct.TensorType("logits", dtype=np.float32)],
                skip_model_load=True,
            )
        except Exception as error:  # torch.export and coremltools raise many unrelated types
            raise ConversionError(f"coremltools cannot convert {type(model).__name__}: {error}") from error


def read_specification(package: Path) -> Any:
    """Parse a package's specification.

    Raises:
        ConversionError: not a Core ML package.
    """
    with quiet():
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    specification = Model_pb2.Model()
    try:
        specification.ParseFromString((package / _SPECIFICATION).read_bytes())
    except (OSError, DecodeError) as error:
        raise ConversionError(f"{package}: not a Core ML package ({error}); export it again") from error
    return specification
