"""int8 and palettized weights: how small, how close, never worse than coremltools' own form, and refusals."""

import numpy as np
import pytest

from converters import coreml, coreml_compress
from converters.errors import ConversionError
from converters.mil import MilProgram
from converters.palette import palettize
from converters.parity import compare
from converters.quiet import quiet
from tests.converters.test_coreml import files_of, run
from tests.converters.tiny import INPUT_SPEC, LABELS, board_of_ios

with quiet():
    import coremltools.optimize.coreml as cto


def decoded_weights(package):
    """Every weight of a convolution or linear layer as the evaluator decodes it, by the layer's name."""
    program = MilProgram(package)
    program.run({name: np.zeros(shape, np.float32) for name, shape in program.inputs.items()})
    layers = [operation for operation in program._block.operations if operation.op_type in ("conv", "linear")]
    return {layer.name: program._constants[layer.inputs["weight"].name].numpy() for layer in layers}


def squared_error(package, original):
    found, expected = decoded_weights(package), decoded_weights(original)
    return sum(float(((found[name] - weight) ** 2).sum()) for name, weight in expected.items())


# 8 bits over 3.5 deviations leave 1.6 % of one per weight, 6-bit palettes 2.5 %, 4-bit ones 10 %, and errors of some ten
# layers add up; the float16 program itself is above 0.9999
@pytest.mark.parametrize(("form", "min_cosine"), [("w8", 0.999), ("palette6", 0.99), ("grouped4", 0.9)])
def test_answers_stay_close(forms, images, reference, form, min_cosine):
    parity = compare(reference["features"][:12], run(MilProgram(forms[form]), images[:12])["features"])
    assert parity.min_cosine > min_cosine


@pytest.mark.parametrize(
    ("form", "operation"),
    [
        ("w8", "constexpr_affine_dequantize"),
        ("palette6", "constexpr_lut_to_dense"),
        ("grouped4", "constexpr_lut_to_dense"),
    ],
)
def test_weights_are_stored_small(forms, package, form, operation):
    assert operation in MilProgram(forms[form]).op_types
    size, before = ((path / coreml.WEIGHTS).stat().st_size for path in (forms[form], package))
    assert size < before - 10_000  # 24,000 of the weights are in tensors above the threshold, two bytes each


@pytest.mark.parametrize("form", ["w8", "palette6", "grouped4"])
def test_metadata_travels_along(forms, form):
    assert coreml.read_metadata(forms[form]) == INPUT_SPEC
    assert coreml.read_metadata(forms[form], "fieldvit.labels") == list(LABELS)


def test_int8_weights_are_symmetric_with_a_scale_per_channel(forms, package):
    original = decoded_weights(package)
    for name, weight in decoded_weights(forms["w8"]).items():
        flat, exact = weight.reshape(len(weight), -1), original[name].reshape(len(weight), -1)
        if exact.size > coreml_compress.WEIGHT_THRESHOLD:
            steps = np.abs(exact).max(axis=1) / 127  # half of one, and float16 moves the scale by 2**-11 of 127 steps
            assert (np.abs(flat - exact) <= steps[:, None] * (0.5 + 127 / 2048 + 0.01)).all()


def test_int8_weights_are_never_worse_than_coremltools(forms, package, tmp_path):
    stock = coreml.save(
        _stock(package, cto.linear_quantize_weights, cto.OpLinearQuantizerConfig()), tmp_path / "s.mlpackage"
    )
    assert squared_error(forms["w8"], package) <= squared_error(stock, package)


def test_palettes_are_closer_than_even_ones(forms, package, tmp_path):
    even = cto.OpPalettizerConfig(mode="uniform", nbits=6)
    stock = coreml.save(_stock(package, cto.palettize_weights, even), tmp_path / "s.mlpackage")
    assert squared_error(forms["palette6"], package) < 0.7 * squared_error(stock, package)


def test_saved_palettes_are_ours(forms, package):
    original = decoded_weights(package)
    for name, weight in decoded_weights(forms["palette6"]).items():
        if weight.size > coreml_compress.WEIGHT_THRESHOLD:
            palette, indices = palettize(original[name].astype(np.float16), 6)
            np.testing.assert_array_equal(weight.reshape(-1), palette[indices].astype(np.float32))


def test_each_group_of_channels_has_its_own_palette(forms):
    for weight in decoded_weights(forms["grouped4"]).values():
        if weight.size > coreml_compress.WEIGHT_THRESHOLD:
            assert all(len(np.unique(group)) <= 16 for group in weight.reshape(len(weight) // 8, -1))
            assert len(np.unique(weight)) > 16


@pytest.mark.parametrize("form", ["w8", "palette6", "grouped4"])
def test_another_process_writes_the_same_bytes(forms, rebuilt, form):
    assert files_of(forms[form]) == files_of(rebuilt / forms[form].name)


def test_compressing_leaves_the_source_alone(package, tmp_path):
    before = files_of(package)
    coreml_compress.quantize_weights(package, tmp_path / "w8.mlpackage")
    assert files_of(package) == before


def test_groups_need_a_board_and_a_package_of_ios_18(forms, package, tmp_path):
    path = tmp_path / "x.mlpackage"
    with pytest.raises(ConversionError, match="a grouped palette needs iOS 18, but boards of iphone-15 may run iOS 17"):
        coreml_compress.palettize_weights(forms["ios18"], path, board=board_of_ios(17), group_size=8)
    with pytest.raises(ConversionError, match="is for iOS 17, but a grouped palette needs iOS 18; convert it with"):
        coreml_compress.palettize_weights(package, path, board=board_of_ios(18), group_size=8)
    with pytest.raises(ConversionError, match="at least one channel, got 0"):
        coreml_compress.palettize_weights(forms["ios18"], path, board=board_of_ios(18), group_size=0)


def test_other_requests_are_refused(package, tmp_path):
    with pytest.raises(ConversionError, match=r"must end in \.mlpackage"):
        coreml_compress.quantize_weights(package, tmp_path / "x")
    with pytest.raises(ConversionError, match="index has 1, 2, 3, 4, 6, 8 bits, got 7"):
        coreml_compress.palettize_weights(package, tmp_path / "x.mlpackage", board=board_of_ios(17), num_bits=7)
    with pytest.raises(ConversionError, match="not a Core ML package"):
        coreml_compress.quantize_weights(tmp_path, tmp_path / "x.mlpackage")


def _stock(package, compress, config):
    with quiet():
        return compress(coreml.load(package), cto.OptimizationConfig(global_config=config))
