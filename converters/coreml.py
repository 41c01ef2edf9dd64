"""PyTorch to Core ML: an mlprogram package for iOS 17 or later, byte-identical for the same model in every process.

The package takes the same float32 NHWC image as the TFLite file and gives `features` [1, D] and `logits` [1, K] of the
base head, float16 inside. Nothing here runs on Linux; `converters.mil` evaluates the saved program instead.

coremltools writes the date, random identifiers, maps in hash order and a debug file; `canonicalise` undoes all four.

Other forms of a package are made from one or beside one: `coreml_compress` (int8 and palettized weights), `coreml_w8a8`
(int8 weights and activations), `coreml_multifunction` (a backbone and its training step in one package).
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from converters.coreml_target import MINIMUM_IOS, coremltools_target
from converters.errors import ConversionError
from converters.flatbuffer import canonical_json
from converters.prepare import DeployClassifier, evaluating, feature_dim
from converters.quiet import quiet
from device.contract.files import sync_directory, write_atomic

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"
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
    minimum_ios: int = MINIMUM_IOS,
    removed_passes: Collection[str] = (),
) -> Path:
    """Convert a backbone with its base head to a `.mlpackage` directory, replacing an older one.

    Args:
        model: has `forward_features(images_nchw)` and `head(features)`; its mode is restored.
        input_shape: (1, H, W, C).
        path: the package directory, ending in `.mlpackage`.
        input_spec_metadata: pre-processing facts, stored as user metadata `fieldvit.input`.
        labels: class names in the order of the logits, stored as user metadata `fieldvit.labels`.
        is_half: compute in float16, as the Neural Engine does; else in float32, which takes CPU or GPU.
        minimum_ios: the oldest iOS that is to run it; grouped palettes need 18.
        removed_passes: coremltools' graph passes to leave out.

    Raises:
        ConversionError: the model does not fit, or coremltools refused it.
    """
    require_package_name(path)
    feature_dim(model, input_shape)
    with evaluating(model):
        package = convert_module(
            DeployClassifier(model).eval(),
            {"images": torch.zeros(input_shape)},
            ("features", "logits"),
            name=type(model).__name__,
            is_half=is_half,
            minimum_ios=minimum_ios,
            removed_passes=removed_passes,
        )
    package.user_defined_metadata["fieldvit.input"] = canonical_json(dict(input_spec_metadata)).decode()
    package.user_defined_metadata["fieldvit.labels"] = canonical_json(list(labels)).decode()
    return save(package, path)


def convert_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    name: str,
    is_half: bool,
    minimum_ios: int = MINIMUM_IOS,
    removed_passes: Collection[str] = (),
) -> Any:
    """Convert a module whose arguments and results are tensors to a `coremltools` model in memory.

    Args:
        module: in evaluation mode; returns its outputs in the order of `outputs`.
        inputs: an example of every argument, float32 or int32, under its name.
        outputs: names of the results, all float32.
        name: what to call the module in an error.
        is_half: compute in float16; else in float32.
        minimum_ios: the oldest iOS that is to run it.
        removed_passes: coremltools' graph passes to leave out.

    Raises:
        ConversionError: coremltools refused it.
    """
    with quiet():
        import coremltools as ct

        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes(set(removed_passes))
        try:
            exported = torch.export.export(module, tuple(inputs.values())).run_decompositions({})
            return ct.convert(
                exported,
                convert_to="mlprogram",
                minimum_deployment_target=coremltools_target(ct, minimum_ios),
                compute_precision=ct.precision.FLOAT16 if is_half else ct.precision.FLOAT32,
                inputs=[
                    ct.TensorType(key, shape=tuple(value.shape), dtype=value.numpy().dtype.type)
                    for key, value in inputs.items()
                ],
                outputs=[ct.TensorType(output, dtype=np.float32) for output in outputs],
                pass_pipeline=pipeline,
                skip_model_load=True,
            )
        except Exception as error:  # torch.export and coremltools raise many unrelated types
            raise ConversionError(f"coremltools cannot convert {name}: {error}") from error


def save(package: Any, path: Path) -> Path:
    """Save a `coremltools` model as a canonical package, replacing an older one."""

    def write(temporary: Path) -> None:
        package.save(str(temporary))

    return save_with(write, path)


def save_with(write: Callable[[Path], None], path: Path) -> Path:
    """Let `write` fill a temporary package beside `path`, make it canonical, and put it in the place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as directory:
        temporary = Path(directory) / path.name
        write(temporary)
        canonicalise(temporary)
        shutil.rmtree(path, ignore_errors=True)  # a directory cannot be replaced by one rename
        temporary.replace(path)
    sync_directory(path.parent)
    return path


def load(package: Path) -> Any:
    """Load a package as a `coremltools` model without touching it: `MLModel(path)` would rewrite its Manifest.json.

    Raises:
        ConversionError: not a Core ML package.
    """
    specification = read_specification(package)
    with quiet():
        import coremltools as ct

        return ct.models.MLModel(specification, weights_dir=str((package / WEIGHTS).parent), skip_model_load=True)


def require_package_name(path: Path) -> None:
    """Refuse a path that Core ML would not take for a package.

    Raises:
        ConversionError: the suffix is not `.mlpackage`.
    """
    if path.suffix != ".mlpackage":
        raise ConversionError(f"{path}: a Core ML package must end in .mlpackage")


def read_metadata(path: Path, name: str = "fieldvit.input") -> Any:
    """Read one JSON entry of the user metadata back; None where there is none of that name."""
    text = read_specification(path).description.metadata.userDefined.get(name)
    return None if text is None else json.loads(text)


def copy_metadata(source: Path, package: Path) -> None:
    """Give a package the description, author, licence and user metadata of another."""
    specification = read_specification(package)
    specification.description.metadata.CopyFrom(read_specification(source).description.metadata)
    write_atomic(package / SPECIFICATION, specification.SerializeToString(deterministic=True))


def canonicalise(package: Path) -> None:
    """Rewrite a saved package so that equal models are equal bytes: no date, fixed identifiers, sorted maps."""
    specification = read_specification(package)
    specification.description.metadata.userDefined.pop(_DATE_KEY, None)
    write_atomic(package / SPECIFICATION, specification.SerializeToString(deterministic=True))
    manifest = json.loads((package / _MANIFEST).read_text())
    entries = manifest["itemInfoEntries"]
    identifiers = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper() for old, entry in entries.items()}
    manifest["itemInfoEntries"] = {identifiers[old]: entry for old, entry in entries.items()}
    manifest["rootModelIdentifier"] = identifiers[manifest["rootModelIdentifier"]]
    write_atomic(package / _MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    for extra in package.iterdir():  # such as executorch_debug_handle_mapping.json, which Core ML does not read
        if extra.is_file() and extra.name != _MANIFEST:
            extra.unlink()
    for file in package.rglob("*"):
        if file.is_file():
            os.chmod(file, 0o644)


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
        specification.ParseFromString((package / SPECIFICATION).read_bytes())
    except (OSError, DecodeError) as error:
        raise ConversionError(f"{package}: not a Core ML package ({error}); export it again") from error
    return specification
