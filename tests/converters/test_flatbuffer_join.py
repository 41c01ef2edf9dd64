"""Two TFLite files joined: every signature answers as before."""

import numpy as np
import pytest

from converters import flatbuffer, tflite
from converters.errors import ConversionError
from converters.flatbuffer_join import join
from converters.gates import assert_head_is_float, check_train_signature
from device.engine import Engine

DIM, CLASSES = 72, 7


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return tflite.convert_head(DIM, CLASSES, tmp_path_factory.mktemp("head") / "head.tflite")


@pytest.fixture
def backbone(artifacts, tmp_path):
    """The signature `features` alone, as the second route gives it."""
    model = flatbuffer.read_model(artifacts["float32"])
    flatbuffer.backbone(model)
    flatbuffer.write_model(model, tmp_path / "backbone.tflite")
    return tmp_path / "backbone.tflite"


def test_both_parts_answer_as_before(artifacts, backbone, head, images, tmp_path):
    joined, whole = Engine(join(backbone, head, tmp_path / "joined.tflite")), Engine(artifacts["float32"])
    assert joined.signatures == whole.signatures == ["features", "infer_f", "train_f"]
    for image in images[:4]:
        np.testing.assert_array_equal(joined.features(image[None]), whole.features(image[None]))
    check_train_signature(tmp_path / "joined.tflite")


def test_joined_files_quantize_and_keep_their_head(backbone, head, images, tmp_path):
    path = join(backbone, head, tmp_path / "joined.tflite")
    quantized = tflite.quantize_static(path, images[:8], tmp_path / "int8.tflite")
    assert_head_is_float(quantized)
    assert flatbuffer.tensor_types(quantized)["features"]["INT8"]


def test_tensor_names_are_unique_and_the_head_s_are_known(artifacts, head, tmp_path):
    model = flatbuffer.read_model(head)
    for definition in model.signatureDefs:
        definition.signatureKey = b"other_" + definition.signatureKey
    flatbuffer.write_model(model, tmp_path / "other.tflite")
    join(head, tmp_path / "other.tflite", tmp_path / "joined.tflite")
    joined = flatbuffer.read_model(tmp_path / "joined.tflite")
    names = [tensor.name for graph in joined.subgraphs for tensor in graph.tensors]
    assert len(names) == len(set(names))


def test_shared_signatures_are_refused(artifacts, head, tmp_path):
    with pytest.raises(ConversionError, match="both have a signature infer_f, train_f"):
        join(artifacts["float32"], head, tmp_path / "joined.tflite")
    assert not list(tmp_path.iterdir())


def test_a_head_for_fewer_than_two_classes_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="num_classes must be 2 or more"):
        tflite.convert_head(DIM, 1, tmp_path / "head.tflite")
