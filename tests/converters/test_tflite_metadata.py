"""Standard TFLite Metadata: read back by our own reader, by flatc with the public schema, and by the task library.

The task library (package tflite-support, wheels up to Python 3.11, its own NumPy) is asked where TFLITE_SUPPORT_PYTHON
names an interpreter that has it.
"""

import contextlib
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from converters import flatbuffer, metadata_schema, tflite
from converters.errors import ConversionError
from converters.runners import open_classifier
from converters.tflite_metadata import LABELS_FILE, About, append_files, classifier_metadata
from device.contract.manifest import InputSpec
from device.contract.records import to_table
from device.preprocess import preprocess
from tests.converters.tiny import LABELS

ABOUT = About(name="tiny", version="1.2.3", description="Für Proben.", author="A. Uthor", licence="Apache-2.0")
RGB = InputSpec(
    height=16, width=16, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), color_order="rgb"
)
SCHEMA = Path(__file__).parents[1] / "support" / "metadata_schema.fbs"
TASK_LIBRARY = os.environ.get("TFLITE_SUPPORT_PYTHON", "")


@pytest.fixture(scope="module")
def described(artifacts, model, tmp_path_factory) -> Path:
    weight, bias = model.head.weight.detach().numpy().T, model.head.bias.detach().numpy()
    path = tmp_path_factory.mktemp("described") / "model.infer.tflite"
    return tflite.bake_head(artifacts["static"], weight, bias, path, labels=LABELS, about=ABOUT)


def test_a_file_says_what_it_takes_and_gives(described):
    content = flatbuffer.read_standard_metadata(described)
    assert content is not None
    (graph,) = content["subgraph_metadata"]
    (image,), (logits,) = graph["input_tensor_metadata"], graph["output_tensor_metadata"]
    assert [content[key] for key in ("name", "version", "author", "license")] == [
        "tiny",
        *["1.2.3", "A. Uthor", "Apache-2.0"],
    ]
    assert image["content"]["content_properties"] == {
        "color_space": "GRAYSCALE",
        "default_size": {"width": 16, "height": 16},
    }
    assert image["process_units"][0]["options"] == {"mean": [127.5], "std": [127.5]}  # of pixels in 0..255
    assert image["stats"] == {"max": [1.0], "min": [-1.0]}
    assert [(file["name"], file["type"]) for file in logits["associated_files"]] == [
        (LABELS_FILE, "TENSOR_AXIS_LABELS")
    ]


def test_labels_lie_in_a_zip_behind_the_model(described):
    with zipfile.ZipFile(described) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [LABELS_FILE]
        assert archive.read(LABELS_FILE).decode().splitlines() == list(LABELS)
    assert Interpreter(str(described)).get_signature_list() == {
        "serving_default": {"inputs": ["images"], "outputs": ["logits"]}
    }


def test_the_same_model_gives_the_same_bytes(artifacts, model, described, tmp_path):
    weight, bias = model.head.weight.detach().numpy().T, model.head.bias.detach().numpy()
    again = tflite.bake_head(artifacts["static"], weight, bias, tmp_path / "b.tflite", labels=LABELS, about=ABOUT)
    assert again.read_bytes() == described.read_bytes()


def test_without_labels_and_facts_nothing_is_made_up(artifacts, tmp_path):
    path = tflite.bake_head(artifacts["float32"], np.zeros((72, 2)), np.zeros(2), tmp_path / "bare.tflite")
    content = flatbuffer.read_standard_metadata(path)
    assert content is not None
    assert content.keys() == {"subgraph_metadata", "min_parser_version"}
    assert "associated_files" not in content["subgraph_metadata"][0]["output_tensor_metadata"][0]
    assert not zipfile.is_zipfile(path)
    assert flatbuffer.read_standard_metadata(artifacts["float32"]) is None


def test_a_colour_order_without_a_name_is_refused():
    with pytest.raises(ConversionError, match="colour order 'bgr' has no name in TFLite Metadata; use rgb or gray"):
        classifier_metadata(ABOUT, replace(RGB, color_order="bgr"), has_labels=True)


@settings(deadline=None, max_examples=50)
@given(st.text(), st.text(), st.booleans(), st.integers(1, 2**31), st.floats(0.01, 10))
def test_what_is_packed_is_unpacked(name, author, has_labels, size, std):
    spec = InputSpec(height=size, width=size, channels=1, mean=(0.5,), std=(std,))
    content = classifier_metadata(About(name=name, author=author), spec, has_labels=has_labels)
    packed = metadata_schema.pack(content)
    assert leaves(metadata_schema.unpack(packed)) == same_as(content)
    assert packed == metadata_schema.pack(content)


def test_another_format_is_named():
    with pytest.raises(ConversionError, match="TFLite Metadata has identifier b'XXXX', not b'M001'"):
        metadata_schema.unpack(b"\0\0\0\0XXXX")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damage_raises_nothing_but_our_error(data):
    packed = bytearray(metadata_schema.pack(classifier_metadata(ABOUT, RGB, has_labels=True)))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ConversionError):
        metadata_schema.unpack(bytes(packed[: data.draw(st.integers(0, len(packed)))]))


def test_files_keep_their_order_and_times_whoever_asks():
    forward, backward = {"a": b"1", "b": b"2"}, {"b": b"2", "a": b"1"}
    assert append_files(b"model", forward) == append_files(b"model", backward)
    assert append_files(b"model", forward).startswith(b"model")


# --- independent readers ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("flatc") is None, reason="flatc (Debian: flatbuffers-compiler) is not installed")
@pytest.mark.parametrize("spec", [RGB, InputSpec(height=8, width=9, channels=1, mean=(0.3,), std=(0.35,))])
def test_flatc_reads_the_same(spec, tmp_path):
    content = classifier_metadata(ABOUT, spec, has_labels=True)
    (tmp_path / "content.bin").write_bytes(metadata_schema.pack(content))
    command = ["flatc", "--json", "--strict-json", "--natural-utf8", "--raw-binary", SCHEMA, "--", "content.bin"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert leaves(json.loads((tmp_path / "content.json").read_text(encoding="utf-8"))) == same_as(content)


@pytest.mark.skipif(not TASK_LIBRARY, reason="TFLITE_SUPPORT_PYTHON names no Python with tflite-support")
def test_the_task_library_normalizes_and_labels_as_we_do(tmp_path):
    """It takes raw pixels: its answers are ours only if it reads mean, deviation, colours and labels as we wrote them."""
    path, labels, frames = rgb_classifier(tmp_path), ("red fox", "grün", "blue"), rgb_frames()
    np.save(tmp_path / "frames.npy", frames)
    command = [TASK_LIBRARY, "-c", TASK_LIBRARY_SCRIPT, path, tmp_path / "frames.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    scores = np.array([[scores[label] for label in labels] for scores in answers["scores"]])
    np.testing.assert_allclose(scores, open_classifier(path)(preprocess(frames, RGB)), rtol=1e-4, atol=1e-5)
    assert scores.min() < 0  # it would drop those by itself
    assert answers["files"] == [LABELS_FILE]
    assert leaves(answers["metadata"]) == same_as(classifier_metadata(ABOUT, RGB, has_labels=True))


TASK_LIBRARY_SCRIPT = """
import json, sys
import numpy as np
from tflite_support import metadata
from tflite_support.task import vision
path, frames = sys.argv[1], np.load(sys.argv[2])
shown = metadata.MetadataDisplayer.with_model_file(path)
classifier = vision.ImageClassifier.create_from_file(path)
results = [classifier.classify(vision.TensorImage.create_from_array(frame)) for frame in frames]
scores = [{c.category_name: c.score for c in result.classifications[0].categories} for result in results]
content = json.loads(shown.get_metadata_json())
print(json.dumps({"scores": scores, "metadata": content, "files": shown.get_packed_associated_file_list()}))
"""


class RGBModel(nn.Module):
    """One convolution and a mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)

    def forward_features(self, images_nchw: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(images_nchw)).mean((2, 3))


def rgb_classifier(directory: Path) -> Path:
    torch.manual_seed(0)
    backbone = directory / "rgb.tflite"
    tflite.convert_float(RGBModel().eval(), (1, 16, 16, 3), 4, backbone, input_spec=to_table(RGB))
    weight = 5 * np.random.default_rng(0).standard_normal((8, 3))
    labels = ("red fox", "grün", "blue")
    return tflite.bake_head(backbone, weight, np.zeros(3), directory / "infer.tflite", labels=labels, about=ABOUT)


def rgb_frames() -> np.ndarray:
    """Frames uint8 [6, 16, 16, 3] whose channels differ, so that swapped ones show."""
    frames = np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    frames[::2, ..., 0] //= 3
    frames[1::2, ..., 2] //= 4
    return frames


def leaves(value, path=""):
    """Every number and string by where it stands; compared roughly, since flatc prints six decimals."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for key, item in items for place, leaf in leaves(item, f"{path}/{key}").items()}
    return {path: value}


def same_as(content):
    return {
        place: leaf if isinstance(leaf, str) else pytest.approx(leaf, rel=1e-5)
        for place, leaf in leaves(content).items()
    }
