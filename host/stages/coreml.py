"""The Core ML package of a bundle, in the form that the recipe names.

The quantized forms are judged as the TFLite artifacts are: on validation images, against the float model.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from converters import coreml, coreml_compress, coreml_w8a8
from device.contract.board import Board
from device.contract.manifest import InputSpec
from device.contract.records import to_table
from host.errors import ExportError
from host.quantize.spec import HALF
from host.stages.proof import Reference, prove_coreml

WHOLE = "whole.mlpackage"
PALETTE_BITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What a package is made from.

    Args:
        model: in its deploy form, with the base head.
        spec: what the images are.
        labels: of the base classes.
        calibration: gives float32 [N, H, W, C], asked where ranges are needed.
        board: one that is to run it.
    """

    model: nn.Module
    spec: InputSpec
    labels: tuple[str, ...]
    calibration: Callable[[], np.ndarray]
    board: Board


def write_package(package: Package, form: str, path: Path) -> Path:
    """Convert to a `.mlpackage` in one of `host.quantize.spec.COREML_FORMS`.

    Raises:
        ConversionError: coremltools refused it.
    """
    shape = (1, package.spec.height, package.spec.width, package.spec.channels)
    facts = {"input_spec_metadata": to_table(package.spec), "labels": package.labels}
    if form == "w8a8":
        return coreml_w8a8.convert(package.model, shape, path, calibration_images=package.calibration(), **facts)
    if form == HALF:
        return coreml.convert(package.model, shape, path, **facts)
    whole = coreml.convert(package.model, shape, path.with_name(WHOLE), **facts)
    try:
        if form == "w8":
            return coreml_compress.quantize_weights(whole, path)
        return coreml_compress.palettize_weights(whole, path, board=package.board, num_bits=PALETTE_BITS)
    finally:
        shutil.rmtree(whole)


def require_accuracy(path: Path, form: str, make_validation: Callable[[], Reference], max_drop: float) -> None:
    """Refuse a quantized form that costs too much on validation images.

    Raises:
        ExportError: it answers fewer right than `max_drop` allows.
    """
    if form == HALF:
        return
    validation = make_validation()
    proof = prove_coreml(path, validation)
    exact = float((validation.logits.argmax(axis=1) == validation.images.labels).mean())
    if exact - proof.accuracy > max_drop:
        raise ExportError(
            f"Core ML {form} answers {proof.accuracy:.2%} of {proof.images} validation images right, PyTorch {exact:.2%}; "
            f"{max_drop:.4f} less is allowed: take another export.coreml, or raise quantize.max_accuracy_drop"
        )
