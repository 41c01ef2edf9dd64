"""Two functions in one package: each answers as alone, a step moves weights as NumPy does, and refusals."""

import numpy as np
import pytest

from converters import coreml, coreml_multifunction
from converters.coreml_w8a8 import read_int8_layers
from converters.errors import ConversionError
from converters.head import PADDING_LABEL, UNUSED_CLASS_BIAS, train_step
from converters.mil import MilProgram
from tests.converters.test_coreml import files_of
from tests.converters.tiny import BATCH_SIZE, INPUT_SPEC, LABELS, MAX_CLASSES, board_of_ios

DIM = 72
MERGED = ("w8_train", "w8a8_train", "grouped4_train")


def step_inputs(num_samples):
    """A batch of which the last rows are padding, and a head whose last class nobody taught."""
    rng = np.random.default_rng(0)
    f, y = np.zeros((BATCH_SIZE, DIM), np.float32), np.full(BATCH_SIZE, PADDING_LABEL, np.int32)
    f[:num_samples] = rng.standard_normal((num_samples, DIM))
    y[:num_samples] = rng.integers(0, MAX_CLASSES - 1, num_samples)
    W, b = rng.standard_normal((DIM, MAX_CLASSES)), rng.standard_normal(MAX_CLASSES)
    b[-1] = UNUSED_CLASS_BIAS
    return {"f": f, "y": y, "W": W.astype(np.float32), "b": b.astype(np.float32), "lr": np.array([0.5], np.float32)}


@pytest.mark.parametrize("num_samples", [0, 1, BATCH_SIZE])
@pytest.mark.parametrize("form", ["w8_train", "grouped4_train"])
def test_a_step_moves_the_weights_as_numpy_does(forms, form, num_samples):
    inputs = step_inputs(num_samples)
    outputs = MilProgram(forms[form], function="train", round_to_half=True).run(inputs)
    loss, W, b = train_step(inputs["f"], inputs["y"], inputs["W"], inputs["b"], learning_rate=0.5)
    np.testing.assert_allclose(outputs["W_new"], W, atol=1e-5)
    np.testing.assert_allclose(outputs["b_new"], b, atol=1e-5)
    np.testing.assert_allclose(outputs["loss"], [loss], rtol=1e-5)


def test_steps_lower_the_loss(forms):
    program, inputs, losses = MilProgram(forms["w8_train"], function="train"), step_inputs(BATCH_SIZE), []
    inputs["lr"][:] = 0.1
    for _ in range(20):
        outputs = program.run(inputs)
        inputs |= {"W": outputs["W_new"], "b": outputs["b_new"]}
        losses.append(float(outputs["loss"][0]))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("form", MERGED)
def test_the_backbone_answers_as_it_does_alone(forms, images, form):
    inputs = {"images": images[:1]}
    alone = MilProgram(forms[form.removesuffix("_train")]).run(inputs)
    beside = MilProgram(forms[form], function="features").run(inputs)
    assert all((beside[name] == value).all() for name, value in alone.items())


def test_int8_layers_are_the_same_beside_the_step(forms):
    alone, beside = read_int8_layers(forms["w8a8"]), read_int8_layers(forms["w8a8_train"], "features")
    assert len(alone) == len(beside) == 8
    assert all(a.has_the_numbers_of(b) for a, b in zip(alone, beside, strict=True))


@pytest.mark.parametrize("form", MERGED)
def test_metadata_and_functions(forms, form):
    specification = coreml.read_specification(forms[form])
    assert specification.specificationVersion == 9  # iOS 18
    assert {function.name for function in specification.description.functions} == {"features", "train"}
    assert specification.description.defaultFunctionName == "features"
    assert coreml.read_metadata(forms[form]) == INPUT_SPEC
    assert coreml.read_metadata(forms[form], "fieldvit.labels") == list(LABELS)


@pytest.mark.parametrize("form", [*MERGED, "train"])
def test_another_process_writes_the_same_bytes(forms, rebuilt, form):
    assert files_of(forms[form]) == files_of(rebuilt / forms[form].name)


def test_merging_leaves_the_sources_alone(forms, tmp_path):
    before = [files_of(forms[name]) for name in ("w8", "train")]
    coreml_multifunction.merge(forms["w8"], forms["train"], tmp_path / "x.mlpackage", board=board_of_ios(18))
    assert [files_of(forms[name]) for name in ("w8", "train")] == before


def test_an_older_board_is_refused(forms, tmp_path):
    with pytest.raises(ConversionError, match=r"needs iOS 18, but boards of iphone-15 may run iOS 17; raise support"):
        coreml_multifunction.merge(forms["w8"], forms["train"], tmp_path / "x.mlpackage", board=board_of_ios(17))


def test_what_does_not_fit_together_is_named(forms, tmp_path):
    path, board = tmp_path / "x.mlpackage", board_of_ios(18)
    other = coreml_multifunction.convert_train_step(
        tmp_path / "other.mlpackage", feature_dim=3, num_classes=2, batch_size=1
    )
    with pytest.raises(ConversionError, match=r"gives 72 features, but .* trains on 3; convert the step with"):
        coreml_multifunction.merge(forms["w8"], other, path, board=board)
    with pytest.raises(ConversionError, match="has no input 'f'"):
        coreml_multifunction.merge(forms["w8"], forms["w8"], path, board=board)
    with pytest.raises(
        ConversionError, match="palettes in the form of iOS 17; convert the backbone with minimum_ios=18"
    ):
        coreml_multifunction.merge(forms["palette6"], forms["train"], path, board=board)
    with pytest.raises(ConversionError, match="must be positive, got 0, 2, 1"):
        coreml_multifunction.convert_train_step(path, feature_dim=0, num_classes=2, batch_size=1)
