"""Core ML packages: what the saved program computes, what travels in it, and that two processes write the same one."""

import numpy as np
import pytest
import torch
from torch import nn

from converters import coreml
from converters.errors import ConversionError
from converters.mil import MilProgram
from converters.parity import compare
from converters.prepare import DeployClassifier
from tests.converters.tiny import INPUT_SHAPE, INPUT_SPEC, LABELS, TinyHybrid, make_images


def files_of(package):
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*") if path.is_file()}


def run(program: MilProgram, images: np.ndarray) -> dict[str, np.ndarray]:
    outputs = [program.run({"images": image[None]}) for image in images]
    return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}


# float16 weights have 11 bits: 5e-4 relative; rounding every value as well, about twice that
@pytest.mark.parametrize("round_to_half", [False, True])
@pytest.mark.parametrize("output", ["features", "logits"])
def test_saved_program_matches_torch(package, images, reference, output, round_to_half):
    program = MilProgram(package, round_to_half=round_to_half)
    parity = compare(reference[output][:12], run(program, images[:12])[output])
    assert parity.min_cosine > 0.9999
    assert parity.argmax_agreement == 1.0


def test_the_quickstart_model_converts(field_model, tmp_path):
    path = coreml.convert(
        field_model, (1, 32, 32, 1), tmp_path / "field.mlpackage", input_spec_metadata={}, labels=list("0123456789")
    )
    images = make_images(4, size=32)
    with torch.no_grad():
        expected = DeployClassifier(field_model)(torch.from_numpy(images))["logits"].numpy()
    assert compare(expected, run(MilProgram(path), images)["logits"]).min_cosine > 0.9999


def test_rounding_to_half_changes_something(package, images):
    exact, rounded = (
        MilProgram(package, round_to_half=half).run({"images": images[:1]})["logits"] for half in (False, True)
    )
    assert 0 < np.abs(exact - rounded).max() < 0.02


def test_weights_are_half_the_size_of_float32(package, model):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = (package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert (
        1.6 * parameters < weights < 2.6 * parameters
    )  # 2 bytes each, 64-byte headers and alignment; small ones are inline


def test_batch_norm_is_folded(package):
    assert "batch_norm" not in MilProgram(package).op_types


def test_inputs_outputs_and_target(package):
    specification = coreml.read_specification(package)
    assert specification.specificationVersion == 8  # iOS 17
    kinds = [*specification.description.input, *specification.description.output]
    float32 = 65568
    assert [(item.name, list(item.type.multiArrayType.shape), item.type.multiArrayType.dataType) for item in kinds] == [
        ("images", list(INPUT_SHAPE), float32),
        ("features", [1, 72], float32),
        ("logits", [1, 4], float32),
    ]


def test_metadata_travels_inside(package):
    assert coreml.read_metadata(package) == INPUT_SPEC
    assert coreml.read_metadata(package, "fieldvit.labels") == list(LABELS)
    assert coreml.read_metadata(package, "unknown") is None


def test_package_holds_nothing_else(package):
    assert set(files_of(package)) == {
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    }


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(package, rebuilt):
    assert files_of(package) == files_of(rebuilt / "model.mlpackage")


def test_canonicalising_twice_changes_nothing(rebuilt):
    before = files_of(rebuilt / "model.mlpackage")
    coreml.canonicalise(rebuilt / "model.mlpackage")
    assert files_of(rebuilt / "model.mlpackage") == before


def test_other_suffix_is_refused(model, tmp_path):
    with pytest.raises(ConversionError, match=r"must end in \.mlpackage"):
        coreml.convert(model, INPUT_SHAPE, tmp_path / "x.mlmodel", input_spec_metadata={}, labels=[])


def test_unconvertible_model_is_named(tmp_path):
    class Unconvertible(TinyHybrid):
        def forward_features(self, images_nchw):
            return super().forward_features(images_nchw) * float(images_nchw.sum() + 1)

    with pytest.raises(ConversionError, match="coremltools cannot convert Unconvertible"):
        coreml.convert(Unconvertible().eval(), INPUT_SHAPE, tmp_path / "x.mlpackage", input_spec_metadata={}, labels=[])
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named(tmp_path):
    with pytest.raises(ConversionError, match="not a Core ML package"):
        coreml.read_metadata(tmp_path / "nowhere.mlpackage")
    with pytest.raises(ConversionError, match="has no forward_features"):
        coreml.convert(nn.Linear(2, 2), INPUT_SHAPE, tmp_path / "x.mlpackage", input_spec_metadata={}, labels=[])
