"""int8 and palettized Core ML of every family, on photographs: close to PyTorch, and no worse than coremltools' own.

Random weights with every branch open, which amplify each rounding: the limits are what that leaves, not what trained
models lose. A broken fold or scale falls far below them, to cosines of other photos (0.7 and less for most families).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.family_parity import SMALL, convert_coreml, coreml_logits, reference
from converters import coreml, coreml_compress, coreml_w8a8
from converters.mil import MilProgram
from converters.parity import compare
from converters.quiet import quiet
from host.models.registry import find_model
from tests.converters.tiny import board_of_ios

MIN_W8_COSINE = 0.98
"""Half a step of 127 is 0.8 % of a weight's deviation; ten to a hundred layers amplify it to at most 1.3e-2."""
MIN_PALETTE_COSINE = 0.85
"""64 values for a whole tensor leave 2.5 % of a weight's deviation, three times as much as int8: ten times in 1 - cosine."""
MIN_W8A8_COSINE = 0.96
MIN_W8A8_COSINE_OF = {"mobilevitv2/field-64": 0.87, "mobileformer/field-64": 0.87}
"""Long tails stretch one range for all channels; these two lose much in float16 already (`test_families`)."""
MIN_FOLLOWING_COSINE = 0.999
"""In float32 only values that lie on a rounding edge differ from PyTorch's rounding of the same model."""
MIN_FOLLOWING_COSINE_OF = {"mobileformer/field-64": 0.98}
"""One value on an edge, in one photograph of eight, moves its logits this far."""

families = pytest.mark.parametrize("name", SMALL)
pytestmark = pytest.mark.slow


@families
def test_smaller_weights_follow_the_model_as_well_as_coremltools_own(name, tmp_path: Path):
    entry = find_model(*name.split("/"))
    model, images, logits = reference(entry)
    package = convert_coreml(model.deploy(), entry, tmp_path, is_half=True)

    def cosine(path: Path) -> float:
        return compare(logits, coreml_logits(path, images)).min_cosine

    int8 = cosine(coreml_compress.quantize_weights(package, tmp_path / "w8.mlpackage"))
    palette = cosine(
        coreml_compress.palettize_weights(package, tmp_path / "p6.mlpackage", board=board_of_ios(17), num_bits=6)
    )
    assert int8 >= MIN_W8_COSINE
    assert palette >= MIN_PALETTE_COSINE
    assert int8 >= cosine(_stock(package, tmp_path, num_bits=None))
    assert palette >= cosine(_stock(package, tmp_path, num_bits=6))


@families
def test_int8_activations_follow_the_model(name, tmp_path: Path):
    entry = find_model(*name.split("/"))
    model, images, logits = reference(entry)
    deployed, mirrored = model.deploy(), np.ascontiguousarray(images[:, :, ::-1])  # calibrated on other images
    shape = (1, *images.shape[1:])
    labels = [str(label) for label in range(entry.num_classes)]

    def convert(*, is_half: bool) -> Path:
        return coreml_w8a8.convert(
            deployed,
            shape,
            tmp_path / "w8a8.mlpackage",
            calibration_images=mirrored,
            input_spec_metadata={},
            labels=labels,
            is_half=is_half,
        )

    minimum = MIN_W8A8_COSINE_OF.get(name, MIN_W8A8_COSINE)
    assert compare(logits, coreml_logits(convert(is_half=True), images)).min_cosine >= minimum
    with torch.no_grad():
        rounded = coreml_w8a8.quantize(deployed, mirrored)(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    program = MilProgram(convert(is_half=False))
    found = np.concatenate([program.run({"images": image[None]})["logits"] for image in images])
    assert compare(rounded, found).min_cosine >= MIN_FOLLOWING_COSINE_OF.get(name, MIN_FOLLOWING_COSINE)


def _stock(package: Path, directory: Path, *, num_bits: int | None) -> Path:
    """Coremltools' own int8 weights, or its even palette."""
    with quiet():
        import coremltools.optimize.coreml as cto

        if num_bits is None:
            compress, config = cto.linear_quantize_weights, cto.OpLinearQuantizerConfig()
        else:
            compress, config = cto.palettize_weights, cto.OpPalettizerConfig(mode="uniform", nbits=num_bits)
        stock = compress(coreml.load(package), cto.OptimizationConfig(global_config=config))
    return coreml.save(stock, directory / "stock.mlpackage")
