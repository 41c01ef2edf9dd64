"""Bundles of real size for measuring the agent: random weights, photos, our own int8 conversion, a head that fits.

Weights do not change what the agent costs; two seeds make two models, so that an update has something to bring.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.probes import photo_crops, randomize, settle_norms
from converters.bundle import describe, write_bundle
from converters.tflite import convert_float, quantize_static
from device.contract.manifest import Artifact, InputSpec, LearningSpec, Manifest
from device.engine import Engine
from device.learning.slda import SLDA
from device.preprocess import preprocess
from host.models.registry import find_model
from host.quantize.spec import INT8

NUM_CLASSES, MAX_CLASSES = 10, 16
PHOTOS_PER_CLASS = 8
MEAN, STD = 0.45, 0.25  # as `bench.probes.photo_crops`
GOLDEN_FRAMES = 4


@dataclass(frozen=True, slots=True)
class RandomModel:
    """One converted model and what a bundle holds beside it."""

    name: str
    spec: InputSpec
    labels: tuple[str, ...]
    learning: LearningSpec
    files: dict[str, bytes]

    def write(self, directory: Path, release: int) -> Path:
        """Write the bundle of a release."""
        tflite = self.files[f"model.{INT8}.tflite"]
        artifact = Artifact(
            precision=INT8,
            path=f"model.{INT8}.tflite",
            backbone=hashlib.sha256(tflite).hexdigest(),
            accuracy=1.0,
            argmax_agreement=1.0,
            min_cosine=1.0,
            max_abs_difference=0.0,
            golden_tolerance=1e-3,
        )
        manifest = Manifest(
            name=self.name,
            version=f"{release}.0.0",
            release=release,
            task="classify",
            labels=self.labels,
            boards=("generic-x86-64",),
            input=self.spec,
            artifacts=(artifact,),
            learning=self.learning,
            float_accuracy=1.0,
            licence="Apache-2.0",
            provenance={},
            files=describe(self.files),
        )
        path = directory / f"{self.name}-{manifest.version}.fieldvit"
        write_bundle({"manifest.json": manifest.to_json().encode(), **self.files}, path)
        return path


def make_model(name: str, *, seed: int, directory: Path) -> RandomModel:
    """Convert `FAMILY/VARIANT` with the weights of a seed; a conversion that lies in `directory` already is used again."""
    entry = find_model(*name.split("/"))
    size, channels = entry.image_size, entry.in_chans
    spec = InputSpec(
        height=size, width=size, channels=channels, mean=(MEAN,) * channels, std=(STD,) * channels, color_order="rgb"
    )
    path = directory / f"{name.replace('/', '-')}-{seed}.tflite"
    if not path.exists():
        _convert(name, seed, path)
    engine = Engine(path)
    learning = LearningSpec(
        method="slda", feature_dim=engine.feature_dim, max_classes=MAX_CLASSES, max_drop=0.5, shrinkage=1e-2
    )
    frames = make_frames(spec, NUM_CLASSES * PHOTOS_PER_CLASS)
    features = np.stack([engine.features(preprocess(frame[None], spec)) for frame in frames])
    labels = np.arange(len(frames)) % NUM_CLASSES
    learner = SLDA(NUM_CLASSES, engine.feature_dim, shrinkage=learning.shrinkage)
    learner.update(features, labels)
    head = {
        **learner.state(),
        "guard_features": features[: 2 * NUM_CLASSES],
        "guard_labels": labels[: 2 * NUM_CLASSES],
        "feature_mean": features.mean(axis=0),
        "feature_std": features.std(axis=0),
    }
    golden = {
        "frames": frames[:GOLDEN_FRAMES],
        f"{INT8}/features": features[:GOLDEN_FRAMES],
        f"{INT8}/logits": learner.logits(features[:GOLDEN_FRAMES]),
    }
    files = {
        f"model.{INT8}.tflite": path.read_bytes(),
        "head.npz": _npz({f"{INT8}/{key}": array for key, array in head.items()}),
        "golden.npz": _npz(golden),
    }
    names = tuple(f"class-{index}" for index in range(NUM_CLASSES))
    return RandomModel(name.replace("/", "-"), spec, names, learning, files)


def make_frames(spec: InputSpec, count: int) -> np.ndarray:
    """Crops of photos as a camera gives them, uint8 [N, H, W, C]."""
    images = photo_crops(spec.height, spec.channels, count=count, seed=0)
    return np.clip((images * STD + MEAN) * 255, 0, 255).round().astype(np.uint8)


def _convert(name: str, seed: int, path: Path) -> None:
    entry = find_model(*name.split("/"))
    images = photo_crops(entry.image_size, entry.in_chans, count=16, seed=1)
    torch.manual_seed(seed)
    model = settle_norms(randomize(entry.create(), seed), torch.from_numpy(images).permute(0, 3, 1, 2))
    float_path = path.with_suffix(".float")
    shape = (1, entry.image_size, entry.image_size, entry.in_chans)
    convert_float(model.deploy(), shape, MAX_CLASSES, float_path)
    quantize_static(float_path, images, path, float_scopes=entry.float_scopes)
    float_path.unlink()


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
