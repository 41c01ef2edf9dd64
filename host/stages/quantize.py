"""The quantize stage: TFLite in the recipe's precisions, and the proof that each kept its accuracy.

Calibrated on unlabelled training images, judged on the validation images, in LiteRT. The test images are not touched.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from converters.gates import assert_builtin_ops, check_train_signature
from converters.routes import convert_float
from converters.runners import open_features
from converters.tflite import halve_weights, quantize_dynamic, quantize_static
from device.contract.records import to_table
from host.data.inputs import to_input
from host.errors import TrainingError
from host.pipeline import Report
from host.quantize.spec import DYNAMIC, FLOAT, HALF, INT8
from host.recipe import Recipe
from host.stages.data import input_spec, load_model, load_split, model_entry
from host.stages.features import ArrayOf, over_images, torch_features
from host.stages.head import fit_head
from host.stages.train import WEIGHTS


def artifact_path(precision: str) -> str:
    """The file name of one precision's artifact, in stages and bundle."""
    return f"model.{precision}.tflite"


def quantize(recipe: Recipe, run: Path, out: Path, report: Report) -> Mapping[str, Any]:
    """Convert and quantize the trained model of `run` into `out`; `precisions` of the result are those that may ship.

    Raises:
        TrainingError: no quantized artifact keeps the validation accuracy within `quantize.max_accuracy_drop`.
    """
    model = load_model(recipe, run / "train" / WEIGHTS)
    precisions = recipe.quantize.precisions
    report("quantize", 0, len(precisions) + 1, f"TFLite {FLOAT}")
    route = _convert(recipe, model, out / artifact_path(FLOAT))
    for step, precision in enumerate([name for name in precisions if name != FLOAT], 1):  # made from that one
        report("quantize", step, len(precisions) + 1, f"TFLite {precision}")
        _write(precision, recipe, out)
    report("quantize", len(precisions), len(precisions) + 1, "accuracy in LiteRT")
    accuracies = {"torch": _validation_accuracy(recipe, torch_features(model))}
    for precision in precisions:
        path = out / artifact_path(precision)
        assert_builtin_ops(path)
        check_train_signature(path)
        accuracies[precision] = _validation_accuracy(recipe, open_features(path))
    kept = _within_budget(recipe, accuracies)
    for precision in set(precisions) - set(kept):
        (out / artifact_path(precision)).unlink()
    figures = ", ".join(f"{name} {accuracies[name]:.2%}" for name in kept)
    report("quantize", len(precisions) + 1, len(precisions) + 1, f"{figures} of validation images right")
    return {
        "precisions": kept,
        "left_out": [name for name in precisions if name not in kept],
        "route": route,
        **{f"validation_accuracy_{name}": accuracy for name, accuracy in accuracies.items()},
    }


def _convert(recipe: Recipe, model: nn.Module, path: Path) -> str:
    """Write the float32 file; returns the route that the model took."""
    spec = input_spec(recipe)
    shape = (1, spec.height, spec.width, spec.channels)
    return convert_float(model.deploy(), shape, recipe.continual.max_classes, path, input_spec=to_table(spec))


def _write(precision: str, recipe: Recipe, out: Path) -> None:
    float_path, path = out / artifact_path(FLOAT), out / artifact_path(precision)
    if precision == INT8:
        scopes = model_entry(recipe.model).float_scopes
        quantize_static(float_path, calibration_frames(recipe), path, float_scopes=scopes)
    else:
        {DYNAMIC: quantize_dynamic, HALF: halve_weights}[precision](float_path, path)


def calibration_frames(recipe: Recipe) -> np.ndarray:
    """Training images, drawn by the recipe's seed, as the model gets them: float32 [N, H, W, C]."""
    images = load_split(recipe).train.images
    chosen = np.random.default_rng(recipe.seed).permutation(len(images))[: recipe.quantize.calibration_images]
    return to_input([images[int(index)] for index in chosen], input_spec(recipe))


def _within_budget(recipe: Recipe, accuracies: Mapping[str, float]) -> list[str]:
    """The precisions that keep their accuracy, in the recipe's order."""
    spec = recipe.quantize
    kept = [name for name in spec.precisions if accuracies["torch"] - accuracies[name] <= spec.max_accuracy_drop]
    lost = [name for name in spec.precisions if name not in kept]
    if FLOAT in lost or (lost and not {INT8, DYNAMIC} & set(kept)):
        figures = ", ".join(f"{name} answers {accuracies[name]:.2%}" for name in lost)
        raise TrainingError(
            f"{figures} of the validation images right, PyTorch {accuracies['torch']:.2%}; {spec.max_accuracy_drop:.4f} less "
            "is allowed: train for more epochs, or raise quantize.calibration_images or quantize.max_accuracy_drop"
        )
    return kept


def _validation_accuracy(recipe: Recipe, features_of: ArrayOf) -> float:
    split, spec = load_split(recipe), input_spec(recipe)
    head = fit_head(recipe, split, spec, features_of).linear
    logits = head.logits(over_images(features_of, split.validation.images, spec))
    return float((logits.argmax(axis=1) == split.validation.labels).mean())
