"""Small bundles without a model that runs: for what only looks at manifests, hashes and signatures."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

from device.contract.manifest import Artifact, FileEntry, InputSpec, LearningSpec, Manifest

CONTENT = b"no model, only bytes"


def make_manifest(
    *, release: int = 1, version: str = "0.1.0", boards: tuple[str, ...] = ("generic-x86-64",)
) -> Manifest:
    """A manifest of one file, `model.int8.tflite`."""
    artifact = Artifact(
        precision="int8",
        path="model.int8.tflite",
        backbone="0" * 64,
        accuracy=1.0,
        argmax_agreement=1.0,
        min_cosine=1.0,
        max_abs_difference=0.0,
        golden_tolerance=0.1,
    )
    return Manifest(
        name="plain",
        version=version,
        release=release,
        task="classify",
        labels=("a", "b"),
        boards=boards,
        input=InputSpec(height=8, width=8, channels=1, mean=(0.5,), std=(0.5,)),
        artifacts=(artifact,),
        learning=LearningSpec(method="slda", feature_dim=4, max_classes=8, max_drop=0.01, shrinkage=1e-4),
        float_accuracy=1.0,
        licence="Apache-2.0",
        provenance={},
        files={artifact.path: FileEntry(sha256=hashlib.sha256(CONTENT).hexdigest(), bytes=len(CONTENT))},
    )


def write_plain_bundle(path: Path, manifest: Manifest | None = None, *, content: bytes = CONTENT) -> Path:
    """Write a bundle of that manifest; other `content` than the manifest's makes it a damaged one."""
    manifest = manifest or make_manifest()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("manifest.json", manifest.to_json())
        archive.writestr("model.int8.tflite", content)
    return path


def with_content(manifest: Manifest, content: bytes) -> Manifest:
    """The manifest that fits other content."""
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    return replace(manifest, files={"model.int8.tflite": entry})
