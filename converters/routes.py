"""The one place where a model takes the second route to TFLite: when litert-torch refuses it.

What quantizers, boards and phones read is the same either way: the signatures `features`, `infer_f` and `train_f`. Only the
backbone comes from onnx2tf; the head is always litert-torch's. The names of a backbone's tensors then tell no modules, so
int8 keeps fewer float islands in it (`converters.tflite`), which its accuracy and latency will show.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from converters import second_route, tflite
from converters.errors import ConversionError, MissingEnvironmentError, RefusedModelError, UnsupportedOpError
from converters.flatbuffer_join import join
from converters.gates import assert_builtin_ops
from converters.prepare import feature_dim
from converters.tflite import TRAIN_BATCH

FIRST, SECOND = "litert-torch", "onnx2tf"
logger = logging.getLogger(__name__)
_REASON = 300
"""Characters of a refusal in the log."""


def convert_float(
    model: nn.Module,
    input_shape: tuple[int, int, int, int],
    num_classes: int,
    path: Path,
    *,
    train_batch: int = TRAIN_BATCH,
    input_spec: Mapping[str, Any] | None = None,
) -> str:
    """Convert a backbone and a trainable head by litert-torch, or by onnx2tf where that refuses the backbone.

    Arguments are those of `tflite.convert_float`.

    Returns:
        The route that was taken, `FIRST` or `SECOND`; a warning in the log tells of the second, and why.

    Raises:
        ConversionError: the model does not fit, or neither route takes it; the message has both reasons.
        MissingEnvironmentError: litert-torch refuses it, and the second route is not installed.
    """
    options: dict[str, Any] = {"train_batch": train_batch, "input_spec": input_spec}
    try:
        assert_builtin_ops(tflite.convert_float(model, input_shape, num_classes, path, **options))
    except (RefusedModelError, UnsupportedOpError) as refusal:
        path.unlink(missing_ok=True)  # foreign operations show only in the file
        _convert_by_second(model, input_shape, num_classes, path, refusal, **options)
        return SECOND
    return FIRST


def _convert_by_second(
    model: nn.Module,
    input_shape: tuple[int, int, int, int],
    num_classes: int,
    path: Path,
    refusal: ConversionError,
    *,
    train_batch: int,
    input_spec: Mapping[str, Any] | None,
) -> None:
    name = type(model).__name__
    with tempfile.TemporaryDirectory(prefix="fieldvit-route-") as temporary:
        backbone, head = Path(temporary) / "backbone.tflite", Path(temporary) / "head.tflite"
        try:
            second_route.convert_backbone(model, input_shape, backbone)
        except MissingEnvironmentError as missing:
            raise MissingEnvironmentError(f"{refusal}; the second route may take it, but {missing}") from refusal
        except ConversionError as error:
            raise ConversionError(f"{refusal}; the second route neither: {error}") from refusal
        tflite.convert_head(feature_dim(model, input_shape), num_classes, head, train_batch=train_batch)
        join(backbone, head, path)
    if input_spec is not None:
        tflite.record_input(path, input_spec)
    logger.warning("%s was converted by %s, because %s", name, SECOND, _one_line(refusal))


def _one_line(refusal: ConversionError) -> str:
    """The beginning of what the first route said; its compiler appends whole graphs."""
    text = " ".join(str(refusal).split())
    return text if len(text) <= _REASON else f"{text[:_REASON]}..."
