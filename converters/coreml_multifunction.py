"""One Core ML package with two functions: `features`, the backbone in any form, and `train`, one step of its head.

`train` is `converters.head.TrainHead`, the very module that the TFLite file's `train_f` is made from, in float32 on both
sides: weights go in and come out, and an app keeps them. Rows whose label is outside 0..K-1 are padding. So a phone
learns from one file without Apple's updatable models, which end at the old network format.

A package with more than one function is of specification 9: iOS 18. coremltools drops the user metadata of its sources
and reads packages in a way that rewrites them; both are seen to here.
"""

import shutil
import tempfile
from pathlib import Path

import torch

from converters import coreml
from converters.coreml_target import MULTIFUNCTION_IOS, ios_of_specification, require_ios
from converters.errors import ConversionError
from converters.head import TrainHead
from converters.mil import MilProgram
from converters.quiet import quiet
from device.contract.board import Board

FEATURES = "features"
TRAIN = "train"


def convert_train_step(path: Path, *, feature_dim: int, num_classes: int, batch_size: int) -> Path:
    """Write a package whose only function is one SGD step of softmax regression, float32.

    Inputs are f [B, D], y int32 [B], W [D, K], b [K] and lr [1]; outputs loss [1], W_new and b_new.

    Args:
        path: where to write; ends in `.mlpackage`.
        feature_dim: D of the backbone that it will stand beside.
        num_classes: K, the largest number of classes.
        batch_size: B; fewer samples are padded with label -1 and zeros.

    Raises:
        ConversionError: a size is not positive, the name does not fit, or coremltools refused it.
    """
    coreml.require_package_name(path)
    if min(feature_dim, num_classes, batch_size) < 1:
        raise ConversionError(
            f"feature_dim, num_classes and batch_size must be positive, got {feature_dim}, {num_classes}, {batch_size}"
        )
    inputs = {
        "f": torch.zeros(batch_size, feature_dim),
        "y": torch.zeros(batch_size, dtype=torch.int32),
        "W": torch.zeros(feature_dim, num_classes),
        "b": torch.zeros(num_classes),
        "lr": torch.zeros(1),
    }
    outputs = ("loss", "W_new", "b_new")
    return coreml.save(
        coreml.convert_module(TrainHead().eval(), inputs, outputs, name="TrainHead", is_half=False), path
    )


def merge(features: Path, train: Path, path: Path, *, board: Board) -> Path:
    """Write one package with the functions `features` and `train`; the metadata is that of the backbone.

    Args:
        features: a backbone's package, in any weight form; a palettized one must be for iOS 18.
        train: what `convert_train_step` wrote, for the same feature dimension.
        path: where to write; ends in `.mlpackage`.
        board: the board that it is for.

    Raises:
        ConversionError: the board's iOS is too old, the two do not fit together, or coremltools refused them.
    """
    coreml.require_package_name(path)
    require_ios(board, MULTIFUNCTION_IOS, form="a package with the functions features and train")
    _require_same_dim(features, train)
    _require_current_palettes(features)

    def write(temporary: Path) -> None:
        _save_functions({FEATURES: features, TRAIN: train}, temporary)
        coreml.copy_metadata(features, temporary)

    return coreml.save_with(write, path)


def _require_same_dim(features: Path, train: Path) -> None:
    produced, taken = _size(features, "output", "features"), _size(train, "input", "f")
    if produced != taken:
        raise ConversionError(
            f"{features} gives {produced} features, but {train} trains on {taken}; convert the step with "
            f"feature_dim={produced}"
        )


def _require_current_palettes(features: Path) -> None:
    """Palettes of iOS 17 are another operation than those of iOS 18, and coremltools does not rewrite them."""
    found = ios_of_specification(coreml.read_specification(features).specificationVersion)
    if found < MULTIFUNCTION_IOS and "constexpr_lut_to_dense" in MilProgram(features).op_types:
        raise ConversionError(
            f"{features} has palettes in the form of iOS {found}; convert the backbone with "
            f"minimum_ios={MULTIFUNCTION_IOS}, then palettize it"
        )


def _size(package: Path, kind: str, name: str) -> int:
    """The length of the last axis of an input or output."""
    for item in getattr(coreml.read_specification(package).description, kind):
        if item.name == name:
            return int(item.type.multiArrayType.shape[-1])
    raise ConversionError(f"{package} has no {kind} {name!r}; give the backbone's package and the training step's")


def _save_functions(packages: dict[str, Path], path: Path) -> None:
    """Join the `main` functions of several packages; works on copies, because coremltools rewrites what it reads."""
    with quiet(), tempfile.TemporaryDirectory(dir=path.parent) as directory:
        import coremltools as ct

        descriptor = ct.utils.MultiFunctionDescriptor()
        try:
            for name, package in packages.items():
                copied = shutil.copytree(package, Path(directory) / f"{name}.mlpackage")
                descriptor.add_function(str(copied), "main", name)
            descriptor.default_function_name = FEATURES
            ct.utils.save_multifunction(descriptor, str(path))
        except Exception as error:  # coremltools raises many unrelated types
            raise ConversionError(
                f"coremltools cannot join {', '.join(map(str, packages.values()))}: {error}"
            ) from error
