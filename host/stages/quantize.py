"""The quantize stage: TFLite float32 and int8, and the proof that int8 kept its accuracy.

Calibrated on unlabelled training images, judged on the validation images, in LiteRT. The test images are not touched.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.gates import assert_builtin_ops, check_train_signature
from converters.runners import open_features
from converters.tflite import convert_float, quantize_static
from device.contract.records import to_table
from host.data.inputs import to_input
from host.errors import TrainingError
from host.pipeline import Report
from host.recipe import Recipe
from host.stages.data import input_spec, load_model, load_split, model_entry
from host.stages.features import ArrayOf, over_images, torch_features
from host.stages.head import fit_head
from host.stages.train import WEIGHTS

FLOAT, INT8 = "float32", "int8"


def artifact_path(precision: str) -> str:
    """The file name of one precision's artifact, in stages and bundle."""
    return f"model.{precision}.tflite"


def quantize(recipe: Recipe, run: Path, out: Path, report: Report) -> Mapping[str, Any]:
    """Convert and quantize the trained model of `run` into `out`.

    Raises:
        TrainingError: int8 loses more validation accuracy than `quantize.max_accuracy_drop`.
    """
    split, spec = load_split(recipe), input_spec(recipe)
    model = load_model(recipe, run / "train" / WEIGHTS)
    float_path, int8_path = out / artifact_path(FLOAT), out / artifact_path(INT8)
    report("quantize", 0, 3, "TFLite float32")
    shape = (1, spec.height, spec.width, spec.channels)
    convert_float(model.deploy(), shape, recipe.continual.max_classes, float_path, input_spec=to_table(spec))
    report("quantize", 1, 3, "TFLite int8")
    chosen = np.random.default_rng(recipe.seed).permutation(len(split.train))[: recipe.quantize.calibration_images]
    frames = to_input([split.train.images[int(index)] for index in chosen], spec)
    quantize_static(float_path, frames, int8_path, float_scopes=model_entry(recipe.model).float_scopes)
    report("quantize", 2, 3, "accuracy in LiteRT")
    for path in (float_path, int8_path):
        assert_builtin_ops(path)
        check_train_signature(path)
    metrics = {
        "validation_accuracy_torch": _validation_accuracy(recipe, torch_features(model)),
        "validation_accuracy_float32": _validation_accuracy(recipe, open_features(float_path)),
        "validation_accuracy_int8": _validation_accuracy(recipe, open_features(int8_path)),
    }
    drop = metrics["validation_accuracy_torch"] - metrics["validation_accuracy_int8"]
    if drop > recipe.quantize.max_accuracy_drop:
        raise TrainingError(
            f"int8 answers {metrics['validation_accuracy_int8']:.2%} of the validation images right, float32 "
            f"{metrics['validation_accuracy_torch']:.2%}; {recipe.quantize.max_accuracy_drop:.4f} less is allowed: train "
            "for more epochs, or raise quantize.calibration_images or quantize.max_accuracy_drop"
        )
    figures = "int8 {validation_accuracy_int8:.2%}, float32 {validation_accuracy_torch:.2%}".format(**metrics)
    report("quantize", 3, 3, f"{figures} of validation images right")
    return metrics


def _validation_accuracy(recipe: Recipe, features_of: ArrayOf) -> float:
    split, spec = load_split(recipe), input_spec(recipe)
    head = fit_head(recipe, split, spec, features_of).linear
    logits = head.logits(over_images(features_of, split.validation.images, spec))
    return float((logits.argmax(axis=1) == split.validation.labels).mean())
