"""Smaller weights for a Core ML package: int8 (W8), or a palette of 16 or 64 values with an index per weight.

They take a saved package and write another: the same program in which large constants are decoded from a smaller form
(`constexpr_affine_dequantize`, `constexpr_lut_to_dense`). Activations stay as they are; `coreml_w8a8` has them in int8.

W8 is coremltools' own form: symmetric, a scale per output channel. The palettes are ours (`converters.palette`), put in
by coremltools' custom mode; its `kmeans` mode does not run with the scikit-learn that we pin. Tensors of up to
`WEIGHT_THRESHOLD` weights stay in float: there is little to save in them, and much of a layer norm to lose.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters import coreml
from converters.coreml_target import GROUPED_PALETTES_IOS, ios_of_specification, require_ios
from converters.errors import ConversionError
from converters.palette import palettize
from converters.quiet import quiet
from device.contract.board import Board

WEIGHT_THRESHOLD = 2048
"""The largest tensor that is left alone, in weights: coremltools' default."""


def quantize_weights(package: Path, path: Path) -> Path:
    """Write the package with int8 weights: symmetric, one scale per output channel.

    Raises:
        ConversionError: not a Core ML package, or coremltools refused it.
    """
    with quiet():
        import coremltools.optimize.coreml as cto

        config = cto.OpLinearQuantizerConfig(
            mode="linear_symmetric",
            dtype="int8",
            granularity="per_channel",
            weight_threshold=WEIGHT_THRESHOLD,
        )
    return _compress(package, path, cto.linear_quantize_weights, cto.OptimizationConfig(global_config=config))


def palettize_weights(
    package: Path, path: Path, *, board: Board, num_bits: int = 6, group_size: int | None = None
) -> Path:
    """Write the package with palettized weights.

    Args:
        package: what to compress.
        path: where to write; ends in `.mlpackage`.
        board: the board that it is for.
        num_bits: of an index; 4 bits lose much unless channels are grouped.
        group_size: a palette for each so many output channels, which needs iOS 18 and a package converted for it; None:
            one for the tensor. A tensor whose channels this does not divide stays as it is.

    Raises:
        ConversionError: not a Core ML package, no such width, the board's iOS or the package's is too old for groups,
            or coremltools refused it.
    """
    if group_size is not None:
        _require_groups(package, board, group_size)
    with quiet():
        import coremltools.optimize.coreml as cto

        config = cto.OpPalettizerConfig(
            mode="custom",
            lut_function=lambda weights: palettize(weights, num_bits),
            granularity="per_tensor" if group_size is None else "per_grouped_channel",
            group_size=group_size or 0,
            weight_threshold=WEIGHT_THRESHOLD,
        )
    return _compress(package, path, cto.palettize_weights, cto.OptimizationConfig(global_config=config))


def _require_groups(package: Path, board: Board, group_size: int) -> None:
    if group_size < 1:
        raise ConversionError(f"a palette's group must have at least one channel, got {group_size}")
    require_ios(board, GROUPED_PALETTES_IOS, form="a grouped palette")
    found = ios_of_specification(coreml.read_specification(package).specificationVersion)
    if found < GROUPED_PALETTES_IOS:
        raise ConversionError(
            f"{package} is for iOS {found}, but a grouped palette needs iOS {GROUPED_PALETTES_IOS}; convert it with "
            f"minimum_ios={GROUPED_PALETTES_IOS}"
        )


def _compress(package: Path, path: Path, compress: Callable[[Any, Any], Any], config: Any) -> Path:
    coreml.require_package_name(path)
    source = coreml.load(package)
    try:
        with quiet():
            compressed = compress(source, config)
    except ConversionError:
        raise
    except Exception as error:  # coremltools raises many unrelated types
        raise ConversionError(f"coremltools cannot compress {package}: {error}") from error
    compressed.user_defined_metadata.update(source.user_defined_metadata)
    return coreml.save(compressed, path)
