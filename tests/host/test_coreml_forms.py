"""The forms of the Core ML package: what each holds, and that one which costs too much is refused."""

from pathlib import Path

import numpy as np
import pytest

from converters.parity import compare
from device.contract.board import load_board
from device.contract.manifest import InputSpec
from host.data.splits import LabeledImages
from host.errors import ExportError, RecipeError
from host.quantize.spec import COREML_FORMS
from host.recipe import ExportSpec
from host.stages.coreml import WHOLE, Package, require_accuracy, write_package
from host.stages.features import coreml_logits
from host.stages.proof import Reference, coreml_name, min_agreement
from tests.converters.tiny import INPUT_SHAPE, LABELS, make_images, make_model

_, HEIGHT, WIDTH, CHANNELS = INPUT_SHAPE
SPEC = InputSpec(height=HEIGHT, width=WIDTH, channels=CHANNELS, mean=(0.0,), std=(1.0,), color_order="gray")


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(
        model=make_model(),
        spec=SPEC,
        labels=LABELS,
        calibration=lambda: make_images(16),
        board=load_board("iphone-15"),
    )


def total_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_every_form_answers_as_float16_does_and_is_no_larger(package, tmp_path):
    images = make_images(8)
    paths = {form: write_package(package, form, tmp_path / form / "model.mlpackage") for form in COREML_FORMS}
    logits = {form: coreml_logits(path)(images) for form, path in paths.items()}
    for form in COREML_FORMS:
        assert compare(logits["float16"], logits[form]).min_cosine > 0.98, form
        assert not (paths[form].parent / WHOLE).exists()
    for form in ("w8", "palette6"):
        assert not np.array_equal(logits[form], logits["float16"])
        assert total_bytes(paths[form]) < total_bytes(paths["float16"])


@pytest.mark.slow
def test_a_form_that_costs_too_much_is_refused(package, tmp_path):
    images = make_images(8)
    path = write_package(package, "w8", tmp_path / "model.mlpackage")
    frames = (images * 255).round().clip(0, 255).astype(np.uint8)
    logits = np.eye(len(LABELS), dtype=np.float32)[np.arange(8) % len(LABELS)]
    reference = Reference(
        images=LabeledImages(images=frames, labels=np.arange(8) % len(LABELS)),
        spec=SPEC,
        features=np.zeros((8, 1), np.float32),
        logits=logits,  # every answer right, as the tiny model's are not
    )
    with pytest.raises(ExportError, match=r"Core ML w8 answers .* PyTorch 100.00%; 0.0100 less is allowed"):
        require_accuracy(path, "w8", lambda: reference, 0.01)
    require_accuracy(path, "w8", lambda: reference, 1.0)
    require_accuracy(path, "float16", lambda: pytest.fail("float16 needs no proof of its own"), 0.0)


def test_a_recipe_names_a_form_that_there_is():
    assert ExportSpec(coreml="w8a8").coreml == "w8a8"
    with pytest.raises(RecipeError, match=r"export.coreml must be one of float16, w8, w8a8, palette6, got 'int4'"):
        ExportSpec(coreml="int4")


def test_bounds_follow_the_form():
    assert (min_agreement(coreml_name("float16")), min_agreement(coreml_name("w8a8"))) == (0.995, 0.9)
