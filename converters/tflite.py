"""PyTorch to TFLite through litert-torch, and to int8 or float16 through ai-edge-quantizer.

One file holds three signatures: `features` (the backbone, once: every signature that holds it would cost its own packed
copy of the weights), `infer_f` and `train_f` (the head, float32, stateless). A LiteRT app on any platform can classify
and learn from it. Quantization touches `features` only: a train step calibrated to int8 still runs but never learns.

The int8 recipe keeps float islands where XNNPACK has no int8 kernel: GELU, pooling, softmax, LayerNorm and what is
elementwise in attention. Matrix products are int8, with ranges around zero on their right (`converters.symmetric`).
Measured on EfficientFormer-L1: 1 partition in place of 42, the same accuracy. Input and output stay float32, so a caller
cannot tell the precisions apart.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from converters import flatbuffer
from converters.errors import ConversionError, RefusedModelError
from converters.head import InferHead, TrainHead
from converters.prepare import DeployFeatures, evaluating, feature_dim
from converters.quiet import quiet
from converters.symmetric import PRODUCT, Ranges, products_with_constants, right_operands, with_symmetric
from converters.tflite_metadata import About
from device.contract.files import write_atomic

TRAIN_BATCH = 8
HEAD_TENSORS = r"converters\.head|^infer_f_|^train_f_"
"""Names of the tensors of `infer_f` and `train_f`, which stay float32."""
_COMPUTE = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", PRODUCT)
_FLOAT_OPS = ("GELU", "AVERAGE_POOL_2D", "SOFTMAX")
_FLOAT_SCOPES = (
    "LayerNorm",
    "Attention",
    "BatchNorm1d",  # pooled features are normalized
    "^features_features_output",  # and joined in float32, which costs nothing and spares the learner one rounding
)

# (regex on the name of an operation's output tensor, operation, mode). The last matching rule wins, but the quantizer
# keeps all rules of one regex where that regex first appeared: a late rule for everything needs another spelling, `.+`.
Rule = tuple[str, str, str]


def convert_float(
    model: nn.Module,
    input_shape: tuple[int, int, int, int],
    num_classes: int,
    path: Path,
    *,
    train_batch: int = TRAIN_BATCH,
    input_spec: Mapping[str, Any] | None = None,
) -> Path:
    """Convert a backbone and a trainable head into one float32 TFLite file.

    Signatures, all shapes static:
        features: images [1, H, W, C] -> features [1, D]
        infer_f:  f [1, D], W [D, K], b [K] -> logits [1, K]
        train_f:  f [B, D], y int32 [B], W, b, lr [1] -> loss [1], W_new, b_new; rows with y outside 0..K-1 are padding

    Args:
        model: has `forward_features(images_nchw) -> [B, D]`; its mode is restored.
        input_shape: (1, H, W, C).
        num_classes: K, the largest number of classes that the head may ever hold.
        path: where to write.
        train_batch: B.
        input_spec: pre-processing facts, stored as TFLite metadata `fieldvit.input`.

    Raises:
        ConversionError: the model does not fit.
        RefusedModelError: litert-torch does not take it.
    """
    with quiet():
        import litert_torch

    dim = feature_dim(model, input_shape)
    _require_head(num_classes, train_batch)
    with evaluating(model), quiet():
        converter = litert_torch.signature(
            flatbuffer.FEATURES, DeployFeatures(model).eval(), sample_kwargs={"images": torch.zeros(input_shape)}
        )
        _add_head(converter, dim, num_classes, train_batch)
        try:
            content = converter.convert().model_content()
        except Exception as error:  # torch.export and the MLIR passes raise many unrelated types
            raise RefusedModelError(f"litert-torch cannot convert {type(model).__name__}: {error}") from error
    return _write(content, path, input_spec)


def convert_head(dim: int, num_classes: int, path: Path, *, train_batch: int = TRAIN_BATCH) -> Path:
    """Write the trainable head alone, `infer_f` and `train_f` as above, for features [B, dim] of any backbone."""
    with quiet():
        import litert_torch

    _require_head(num_classes, train_batch)
    with quiet():
        content = _add_head(litert_torch, dim, num_classes, train_batch).convert().model_content()
    return _write(content, path, None)


def record_input(path: Path, input_spec: Mapping[str, Any]) -> Path:
    """Store pre-processing facts in a TFLite file, as its metadata `fieldvit.input`."""
    model = flatbuffer.read_model(path)
    flatbuffer.add_metadata(model, {flatbuffer.INPUT_METADATA: dict(input_spec)})
    flatbuffer.write_model(model, path)
    return path


def _require_head(num_classes: int, train_batch: int) -> None:
    if num_classes < 2 or train_batch < 1:
        raise ConversionError(
            f"num_classes must be 2 or more and train_batch 1 or more, got {num_classes} and {train_batch}"
        )


def _add_head(converter: Any, dim: int, num_classes: int, train_batch: int) -> Any:
    """Add the signatures of the head to litert-torch's converter, or to the package, which makes one."""
    weight, bias = torch.zeros(dim, num_classes), torch.zeros(num_classes)
    labels = torch.zeros(train_batch, dtype=torch.int32)
    converter = converter.signature(
        "infer_f", InferHead().eval(), sample_kwargs={"f": torch.zeros(1, dim), "W": weight, "b": bias}
    )
    return converter.signature(
        "train_f",
        TrainHead().eval(),
        sample_kwargs={"f": torch.zeros(train_batch, dim), "y": labels, "W": weight, "b": bias, "lr": torch.ones(1)},
    )


def quantize_static(
    float_path: Path,
    calibration: np.ndarray,
    path: Path,
    *,
    float_scopes: Sequence[str] = (),
    has_islands: bool = True,
) -> Path:
    """Quantize the backbone to int8: weights per output channel, activations by the range seen in calibration.

    Args:
        float_path: a file that `convert_float` wrote.
        calibration: float32 [N, H, W, C], real images after pre-processing; 32 are usually enough.
        path: where to write.
        float_scopes: regular expressions on tensor names (module paths) whose operations stay float32.
        has_islands: keep in float32 what XNNPACK has no int8 kernel for. Without islands all is int8 but the edges, as
            accelerators want it that run nothing else; on a processor that is slower and less accurate.

    Raises:
        ConversionError: the calibration images do not fit, or the quantizer refused the file.
    """
    shape = _input_shape(float_path)
    if (
        calibration.ndim != 4
        or calibration.shape[1:] != shape[1:]
        or calibration.dtype != np.float32
        or not len(calibration)
    ):
        raise ConversionError(
            f"calibration must be float32 [N, {shape[1]}, {shape[2]}, {shape[3]}], "
            f"got {calibration.dtype} {list(calibration.shape)}; pre-process it with device.preprocess"
        )
    if not np.isfinite(calibration).all():
        raise ConversionError("calibration holds NaN or infinity; every int8 range would be wrong")
    islands = [
        *((".*", operation, "float") for operation in _FLOAT_OPS),
        *((scope, "*", "float") for scope in _FLOAT_SCOPES),
        *((".+", operation, "static") for operation in _COMPUTE),  # also the ones fused under a LayerNorm's name
    ]
    rules = [
        (".*", "*", "static"),
        *(islands if has_islands else ()),
        *((f"^{re.escape(name)};$", PRODUCT, "float") for name in products_with_constants(float_path)),
        *((scope, "*", "float") for scope in float_scopes),
        (".*", "INPUT", "float"),
        (".*", "OUTPUT", "float"),
    ]
    return _quantize(float_path, path, rules, samples=[{"images": image[None]} for image in calibration])


def quantize_dynamic(float_path: Path, path: Path) -> Path:
    """Quantize the backbone's weights to int8 and leave activations float; needs no calibration.

    Depthwise convolutions stay float32: XNNPACK does not run them with such weights. Not for tflite-runtime 2.14, which
    computes the fully connected layers wrongly: its features were off by a quarter of the largest where LiteRT and `tf.lite`
    agree to 1 % (`fieldvit verify --runtimes`).
    """
    return _quantize(float_path, path, [(".*", operation, "dynamic") for operation in ("CONV_2D", "FULLY_CONNECTED")])


def halve_weights(float_path: Path, path: Path) -> Path:
    """Store the backbone's weights as float16; LiteRT widens them when it loads the file, and computes in float32.

    So does tflite-runtime 2.14. `tf.lite` of TensorFlow 2.19 does only without its XNNPACK delegate, which refuses depthwise
    convolutions with such weights and makes NaN of others.
    """
    operations = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    return _quantize(float_path, path, [(".*", operation, "float16") for operation in operations])


def bake_head(
    path: Path,
    weight: np.ndarray,
    bias: np.ndarray,
    out_path: Path,
    *,
    labels: tuple[str, ...] = (),
    about: About = About(),  # noqa: B008 (frozen)
) -> Path:
    """Write `model.infer.tflite`, image to logits, for tools that know no signatures; see `flatbuffer.bake_head`."""
    return flatbuffer.bake_head(path, weight, bias, out_path, labels=labels, about=about)


def _quantize(float_path: Path, path: Path, rules: Sequence[Rule], *, samples: Sequence[dict[str, Any]] = ()) -> Path:
    with quiet():
        from ai_edge_quantizer import quantizer

        try:
            recipe = _recipe([*rules, (HEAD_TENSORS, "*", "float")])
            aeq = quantizer.Quantizer(str(float_path), recipe.get_quantization_recipe())
            ranges = _calibrate(float_path, recipe, samples) if samples else None
            result = aeq.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ConversionError(
                f"{float_path}: ai-edge-quantizer refused it ({error}); name the layer in float_scopes to keep it float"
            ) from error
    return _write(bytes(result.quantized_model), path, None)


def _calibrate(float_path: Path, recipe: Any, samples: Sequence[dict[str, Any]]) -> Ranges:
    """The lowest and highest value of every tensor over all samples; around zero where a product needs that.

    The quantizer by itself averages them from sample to sample, and clips what is above the average, which trained
    models have: that costs accuracy.
    """
    from ai_edge_quantizer import calibrator
    from ai_edge_quantizer.utils import qsv_utils

    # one thread: the order of additions, and so the ranges, must not depend on scheduling
    ranges = calibrator.Calibrator(str(float_path), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    ranges.calibrate({flatbuffer.FEATURES: samples}, recipe)
    return with_symmetric(ranges.get_model_qsvs(), right_operands(float_path))


def _recipe(rules: Sequence[Rule]) -> Any:
    from ai_edge_quantizer import recipe_manager

    manager = recipe_manager.RecipeManager()
    for scope, operation, mode in rules:
        if mode == "static":
            manager.add_static_config(scope, operation, 8, 8)
        elif mode == "dynamic":
            manager.add_dynamic_config(scope, operation, 8)
        elif mode == "float16":
            manager.add_quantization_config(scope, operation, _half_weights(), algorithm_key="float_casting")
        else:
            manager.add_quantization_config(scope, operation, algorithm_key="no_quantize")
    return manager


def _half_weights() -> Any:
    from ai_edge_quantizer import qtyping

    return qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )


def _input_shape(path: Path) -> tuple[int, ...]:
    model = flatbuffer.read_model(path)
    graph = model.subgraphs[0]
    return tuple(int(size) for size in graph.tensors[graph.inputs[0]].shape)


def _write(content: bytes, path: Path, input_spec: Mapping[str, Any] | None) -> Path:
    write_atomic(path, content)
    return path if input_spec is None else record_input(path, input_spec)
