"""A bundle with a model that really runs: 8x8 gray frames, 16 features, four classes (which quadrant is bright).

Converted once per test session with litert-torch; bundles of any version, and damaged ones, are then written in milliseconds.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from device.contract.manifest import (
    PROJECTOR_SCHEMA,
    Artifact,
    FileEntry,
    InputSpec,
    LearningSpec,
    Manifest,
    ProjectorEntry,
)
from device.engine import Engine
from device.learning.slda import SLDA
from device.preprocess import preprocess

LABELS = ("north-west", "north-east", "south-west", "south-east")
NEW_LABEL = "center"
SPEC = InputSpec(height=8, width=8, channels=1, mean=(0.5,), std=(0.5,))
LEARNING = LearningSpec(method="slda", feature_dim=16, max_classes=8, max_drop=0.05, shrinkage=1e-2)
NEWER_VERSION = 99
PRECISIONS = ("int8", "float32")  # two files of the same bytes: what matters here is which one is chosen


@dataclass(frozen=True)
class TinyModel:
    """The converted model and everything a bundle of it holds."""

    tflite: bytes
    newer: bytes  # the same, but for a version of an operation that no runtime knows yet
    head: dict[str, np.ndarray]
    golden: dict[str, np.ndarray]


def make_frames(count: int, class_index: int, *, seed: int = 0) -> np.ndarray:
    """Noisy frames uint8 [n, 8, 8, 1] of one class; index 4 is the class that no bundle ships."""
    frames = np.random.default_rng([seed, class_index]).integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    rows, columns = (
        (slice(2, 6), slice(2, 6))
        if class_index == 4
        else (
            slice(4 * (class_index // 2), 4 * (class_index // 2) + 4),
            slice(4 * (class_index % 2), 4 * (class_index % 2) + 4),
        )
    )
    frames[:, rows, columns] += 180
    return frames


def write_frames(directory: Path, count: int, class_index: int, *, seed: int = 0, prefix: str = "") -> list[Path]:
    """Write frames as .npy, renamed into place as a camera should; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, frame in enumerate(make_frames(count, class_index, seed=seed)):
        path = directory / f"{prefix}c{class_index}-{seed}-{number:04d}.npy"
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, frame[:, :, 0])
        part.rename(path)
        paths.append(path)
    return paths


def convert_tiny_model(directory: Path, *, seed: int = 0) -> TinyModel:
    """Convert the model and compute its head and golden outputs with the device's own code.

    Another seed is another backbone: the same task, but its features are others.
    """
    tflite = directory / f"tiny-{seed}.tflite"
    _convert(tflite, seed)
    _write_newer(tflite, directory / "newer.tflite")
    engine = Engine(tflite)
    frames = np.concatenate([make_frames(40, k, seed=1) for k in range(4)])
    labels = np.repeat(np.arange(4), 40)
    features = np.stack([engine.features(preprocess(frame[None], SPEC)) for frame in frames])
    learner = SLDA(4, LEARNING.feature_dim, shrinkage=LEARNING.shrinkage)
    learner.update(features[::2], labels[::2])
    state = {
        **learner.state(),
        "guard_features": features[1::2],
        "guard_labels": labels[1::2],
        "feature_mean": features.mean(axis=0),
        "feature_std": features.std(axis=0),
    }
    chosen = slice(0, None, 20)
    golden = {"frames": frames[chosen]}
    for precision in PRECISIONS:
        golden[f"{precision}/features"] = features[chosen]
        golden[f"{precision}/logits"] = learner.logits(features[chosen])
    head = {f"{precision}/{name}": array for precision in PRECISIONS for name, array in state.items()}
    return TinyModel(
        tflite=tflite.read_bytes(), newer=(directory / "newer.tflite").read_bytes(), head=head, golden=golden
    )


def save_tiny_models(directory: Path) -> list[Path]:
    """Convert the model of both seeds that tests use, for `ready_tiny_model` elsewhere; returns the files."""
    return [
        save_tiny_model(convert_tiny_model(directory, seed=seed), directory / f"tiny-{seed}.npz") for seed in (0, 1)
    ]


def save_tiny_model(model: TinyModel, path: Path) -> Path:
    arrays = {f"{part}:{name}": a for part in ("head", "golden") for name, a in getattr(model, part).items()}
    files = {name: np.frombuffer(getattr(model, name), np.uint8) for name in ("tflite", "newer")}
    np.savez(path, **files, **arrays)  # type: ignore[arg-type]
    return path


def ready_tiny_model(seed: int = 0) -> TinyModel | None:
    """The model from the directory that FIELDVIT_TINY_MODELS names, where no converter is installed; None without it."""
    if not (directory := os.environ.get("FIELDVIT_TINY_MODELS")):
        return None
    with np.load(Path(directory) / f"tiny-{seed}.npz") as arrays:
        parts = {
            part: {name.partition(":")[2]: arrays[name] for name in arrays if name.startswith(f"{part}:")}
            for part in ("head", "golden")
        }
        return TinyModel(tflite=arrays["tflite"].tobytes(), newer=arrays["newer"].tobytes(), **parts)


def bundle_files(model: TinyModel) -> dict[str, bytes]:
    """The content of every file but the manifest."""
    return {
        **{f"model.{precision}.tflite": model.tflite for precision in PRECISIONS},
        "head.npz": npz(model.head),
        "golden.npz": npz(model.golden),
        "labels.txt": "\n".join(LABELS).encode(),
    }


def make_manifest(files: Mapping[str, bytes], *, release: int = 1, version: str = "", **changes: Any) -> Manifest:
    """The manifest of these files; `changes` replace its fields."""
    artifacts = tuple(
        Artifact(
            precision=precision,
            path=f"model.{precision}.tflite",
            backbone=hashlib.sha256(files[f"model.{precision}.tflite"]).hexdigest(),
            accuracy=1.0,
            argmax_agreement=1.0,
            min_cosine=1.0,
            max_abs_difference=0.0,
            golden_tolerance=1e-3,
        )
        for precision in PRECISIONS
    )
    manifest = Manifest(
        name="tiny",
        version=version or f"{release}.0.0",
        release=release,
        task="classify",
        labels=LABELS,
        boards=("generic-x86-64",),
        input=SPEC,
        artifacts=artifacts,
        learning=LEARNING,
        float_accuracy=1.0,
        licence="Apache-2.0",
        provenance={},
        files={
            name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)) for name, data in files.items()
        },
    )
    return replace(manifest, **changes)


def write_bundle(
    directory: Path, model: TinyModel, *, release: int = 1, files: Mapping[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write `tiny-RELEASE.0.0.fieldvit`; `files` replaces contents, and the manifest fits them."""
    contents = {**bundle_files(model), **(files or {})}
    manifest = make_manifest(contents, release=release, **changes)
    path = directory / f"{manifest.name}-{manifest.version}.fieldvit"
    write_zip(path, {"manifest.json": manifest.to_json().encode(), **contents})
    return path


def projector_between(old: TinyModel, new: TinyModel, directory: Path) -> tuple[ProjectorEntry, bytes]:
    """The file of a bundle of `new` for boards that learned on `old`, learned from frames of the shipped classes."""
    from host.continual.projector import class_means, fit_projector, measure_fit

    engines = []
    for name, model in (("old", old), ("new", new)):
        path = directory / f"{name}.tflite"
        path.write_bytes(model.tflite)
        engines.append(Engine(path))
    frames = np.concatenate([make_frames(60, k, seed=3) for k in range(4)])
    labels = np.repeat(np.arange(4), 60)
    before, after = ([engine.features(preprocess(frame[None], SPEC)) for frame in frames] for engine in engines)
    x, y = np.stack(before), np.stack(after)
    projector = fit_projector(x[::2], y[::2])
    means, mean = class_means(y[::2], labels[::2]), y[::2].mean(axis=0)
    fit = measure_fit(projector, old=x[1::2], new=y[1::2], means=means, mean=mean)
    ends = {
        "from_backbone": hashlib.sha256(old.tflite).hexdigest(),
        "to_backbone": hashlib.sha256(new.tflite).hexdigest(),
    }
    arrays = {"backbones": np.array(list(ends.values()))}
    arrays |= {name: getattr(projector, name).astype(np.float32) for name in ("weight", "bias", "residual")}
    return ProjectorEntry(path="projector.npz", **ends, **asdict(fit)), npz(arrays)


def with_projector(entry: ProjectorEntry, content: bytes) -> dict[str, Any]:
    """What `write_bundle` and `Field.publish` take to add a projector."""
    return {"files": {entry.path: content}, "projectors": (entry,), "schema": PROJECTOR_SCHEMA}


def write_zip(path: Path, contents: Mapping[str, bytes]) -> None:
    """A stored zip of these members, whatever they are called."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def wrong_golden(model: TinyModel) -> dict[str, bytes]:
    """Golden outputs that no board will reproduce: as if the model computed something else here."""
    golden = {name: array + 1 if name.endswith("/features") else array for name, array in model.golden.items()}
    return {"golden.npz": npz(golden)}


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _convert(path: Path, seed: int) -> None:
    import litert_torch
    import torch

    from converters.quiet import quiet

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 8, 3, stride=2)
            self.linear = torch.nn.Linear(8 * 3 * 3, 16)

        def forward(self, frame: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.relu(self.conv(frame.permute(0, 3, 1, 2))).flatten(1))

    class Head(torch.nn.Module):
        def forward(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return features @ weight + bias

    torch.manual_seed(seed)
    head_inputs = (torch.zeros(1, 16), torch.zeros(16, 4), torch.zeros(4))
    with quiet():
        model = litert_torch.signature("features", Features().eval(), (torch.zeros(1, 8, 8, 1),))
        model.signature("infer_f", Head().eval(), head_inputs).convert().export(str(path))


def _write_newer(path: Path, newer: Path) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    model.operatorCodes[-1].version = NEWER_VERSION
    flatbuffer_utils.write_model(model, str(newer))
