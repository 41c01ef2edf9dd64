"""Core ML packages are chosen where an agent is told so; here, where they cannot run, TFLite takes their place.

What a package computes is not tested: coremltools runs models on macOS alone. A stand-in for its model shows which inputs
and outputs are asked for.
"""

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from device.backbone import Backbone, open_backbone
from device.contract.errors import EngineError
from device.contract.manifest import CoreMLArtifact, Manifest
from device.coreml import CoreMLEngine
from device.preprocess import preprocess
from tests.support.tiny_bundle import SPEC, TinyModel, bundle_files, make_frames, make_manifest

COREML = CoreMLArtifact(path="model.mlpackage", argmax_agreement=1.0, min_cosine=1.0, max_abs_difference=0.0)
not_on_a_mac = pytest.mark.skipif(platform.system() == "Darwin", reason="Core ML runs here")


class StandIn:
    """Answers as a package of the exporter does: its input comes back as `features` [1, H * W]."""

    outputs = ("features", "logits")

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (image,) = (inputs.pop("images"), *inputs.values())  # nothing else may be there
        return {name: image.reshape(1, -1) for name in self.outputs}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> CoreMLEngine:
    monkeypatch.setattr("device.coreml._load", lambda _: StandIn())
    return CoreMLEngine(Path("model.mlpackage"), SPEC)


def open_on_coreml(directory: Path, model: TinyModel, coreml: CoreMLArtifact | None) -> Backbone:
    files = bundle_files(model)
    manifest: Manifest = replace(make_manifest(files), coreml=coreml)
    artifact = manifest.artifacts[0]
    (directory / artifact.path).write_bytes(files[artifact.path])
    return open_backbone(directory, manifest, artifact, threads=1, delegate="coreml")


@not_on_a_mac
@pytest.mark.parametrize(
    ("coreml", "why"),
    [(COREML, f"Core ML is in macOS, this is {platform.system()}"), (None, "tiny 1.0.0 holds no Core ML package")],
)
def test_tflite_takes_its_place(tmp_path: Path, tiny_model: TinyModel, coreml: CoreMLArtifact | None, why: str):
    backbone = open_on_coreml(tmp_path, tiny_model, coreml)
    assert (backbone.delegate, backbone.delegate_problem) == ("xnnpack", f"delegate coreml: {why}")
    features = backbone.features(preprocess(tiny_model.golden["frames"][:1], SPEC))
    np.testing.assert_allclose(features, tiny_model.golden["int8/features"][0], atol=1e-5)


def test_images_go_in_and_features_come_out(engine: CoreMLEngine):
    frame = preprocess(make_frames(1, 0), SPEC)
    features = engine.features(frame)
    np.testing.assert_array_equal(features, frame.ravel())
    assert (engine.delegate, engine.delegate_problem) == ("coreml", "")
    assert not np.shares_memory(features, frame)


def test_wrong_frames_and_packages_are_refused(engine: CoreMLEngine, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EngineError, match=r"images must be float32 \[1, 8, 8, 1\], got float32 \[1, 16, 16, 1\]"):
        engine.features(np.zeros((1, 16, 16, 1), np.float32))
    frame = preprocess(make_frames(1, 0), SPEC)
    monkeypatch.setattr(StandIn, "outputs", ("logits",))
    with pytest.raises(EngineError, match=r"has no output features, only \['logits'\]; export it again"):
        engine.features(frame)
    monkeypatch.setattr(StandIn, "predict", lambda *_: 1 / 0)
    with pytest.raises(EngineError, match=r"model\.mlpackage: features failed"):
        engine.features(frame)
