"""The export stage: every artifact proved on the test images, golden vectors, Core ML, manifest and bundle.

All choices were made before this stage: the test images only produce the figures that the manifest states.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from converters.bundle import backbone_hash, describe, write_bundle
from converters.runners import open_features
from converters.tflite import bake_head
from converters.tflite_metadata import About
from device.contract.board import load_board
from device.contract.manifest import (
    MANIFEST_NAME,
    PROJECTOR_SCHEMA,
    SCHEMA_VERSION,
    Artifact,
    CoreMLArtifact,
    InputSpec,
    LearningSpec,
    Manifest,
    ProjectorEntry,
)
from device.contract.records import to_table
from host.data.inputs import same_size
from host.data.splits import ImageSplits, LabeledImages
from host.files import deterministic_npz, sha256_of
from host.models.pretrained import weights_licence
from host.pipeline import Report, package_versions, stage_metrics
from host.quantize.spec import DYNAMIC, FLOAT, HALF, INT8
from host.recipe import Recipe
from host.stages.budget import require_budget
from host.stages.coreml import Package, require_accuracy, write_package
from host.stages.data import base_test_images, input_spec, load_model, load_split, model_entry
from host.stages.documents import ml_bom, model_card, spdx
from host.stages.features import ArrayOf, over_images, torch_features
from host.stages.head import FittedHead, LinearHead, balanced, fit_head
from host.stages.migrate import features_of_earlier, learn_projectors, parts_of, run_backbones
from host.stages.proof import INFER_PATH, Reference, coreml_name, prove_coreml, prove_infer, prove_tflite
from host.stages.quantize import artifact_path, calibration_frames
from host.stages.train import WEIGHTS

OWN_LICENCE = "Apache-2.0"
"""Of what we trained from nothing; weights that training started from keep theirs."""
COREML_PATH = "model.mlpackage"
GOLDEN_FRAMES = 20
GUARD_IMAGES = 1000
"""Held-out features that go to the board, at most."""
# Share of the largest golden feature. Kernels round differently on ARM and x86: measured 1e-6 for float32; a few int8
# steps for int8, where one step of an inner tensor can move a feature by about 1 %. Dynamic rounds activations as well.
GOLDEN_TOLERANCE = {FLOAT: 1e-3, HALF: 1e-3, DYNAMIC: 0.08, INT8: 0.08}


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A bundle in the making: what is known of the model, and what was gathered so far."""

    recipe: Recipe
    run: Path
    out: Path
    split: ImageSplits
    spec: InputSpec
    reference: Reference
    files: dict[str, bytes | Path] = field(default_factory=dict)
    heads: dict[str, np.ndarray] = field(default_factory=dict)
    golden: dict[str, np.ndarray] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    projectors: list[ProjectorEntry] = field(default_factory=list)
    coreml: CoreMLArtifact | None = None


def export(recipe: Recipe, run: Path, out: Path, report: Report) -> Mapping[str, Any]:
    """Prove and pack what `run` holds into `out`; returns the figures that the bundle states.

    Raises:
        ParityError: an artifact does not follow the float model.
        ExportError: an artifact is over a board's budget.
    """
    split, spec = load_split(recipe), input_spec(recipe)
    model = load_model(recipe, run / "train" / WEIGHTS)
    precisions = stage_metrics(run, "quantize")["precisions"]
    steps = len(precisions) + 2
    report("export", 0, steps, "reference")
    float_head = fit_head(recipe, split, spec, torch_features(model)).linear
    draft = _Draft(
        recipe=recipe,
        run=run,
        out=out,
        split=split,
        spec=spec,
        reference=_reference(model, float_head, base_test_images(split), spec),
    )
    draft.golden["frames"] = _golden_frames(split, spec)
    for step, precision in enumerate(precisions, 1):
        report("export", step, steps, f"{precision} against PyTorch")
        _add_tflite(draft, precision)
    _add_infer(draft, precisions[0])
    if "coreml" in recipe.export.formats:
        report("export", steps - 1, steps, "Core ML against PyTorch")
        _add_coreml(draft, model, float_head)
    _require_budgets(draft)
    if recipe.export.migrate_from:
        report("export", steps - 1, steps, "projectors from earlier bundles")
        _add_projectors(draft)
    digest = _write(draft)
    report("export", steps, steps, bundle_name(recipe))
    metrics: dict[str, Any] = {"bundle": bundle_name(recipe), "bundle_sha256": digest}
    if draft.projectors:
        metrics["projectors"] = to_table(draft.projectors)
    return metrics | {"float_accuracy": _float_accuracy(draft)}


def bundle_name(recipe: Recipe) -> str:
    """The file name of a recipe's bundle."""
    return f"{recipe.name}-{recipe.version}.fieldvit"


def _reference(model: nn.Module, head: LinearHead, images: LabeledImages, spec: InputSpec) -> Reference:
    features = over_images(torch_features(model), images.images, spec)
    return Reference(images=images, spec=spec, features=features, logits=head.logits(features))


def _float_accuracy(draft: _Draft) -> float:
    return float((draft.reference.logits.argmax(axis=1) == draft.reference.images.labels).mean())


def _add_tflite(draft: _Draft, precision: str) -> None:
    path = draft.run / "quantize" / artifact_path(precision)
    features_of = open_features(path)
    head = fit_head(draft.recipe, draft.split, draft.spec, features_of)
    proof = prove_tflite(path, head.linear, draft.reference)
    proof.require(precision)
    draft.artifacts.append(
        Artifact(
            precision=precision,
            path=artifact_path(precision),
            backbone=backbone_hash(path, to_table(draft.spec)),
            accuracy=proof.accuracy,
            argmax_agreement=proof.argmax_agreement,
            min_cosine=proof.min_cosine,
            max_abs_difference=proof.max_abs_difference,
            golden_tolerance=GOLDEN_TOLERANCE[precision],
        )
    )
    draft.files[artifact_path(precision)] = path
    _add_head(draft, precision, head, features_of)
    _add_golden(draft, precision, head.linear, features_of)


def _add_infer(draft: _Draft, precision: str) -> None:
    """The file from image to logits, made from the first artifact, for tools that know no signatures."""
    backbone, path = draft.run / "quantize" / artifact_path(precision), draft.out / INFER_PATH
    head = fit_head(draft.recipe, draft.split, draft.spec, open_features(backbone)).linear
    labels, about = draft.split.base_names, _about(draft.recipe, draft.split)
    draft.files[INFER_PATH] = bake_head(backbone, head.weight, head.bias, path, labels=labels, about=about)
    prove_infer(path, draft.reference).require("infer")


def _about(recipe: Recipe, split: ImageSplits) -> About:
    return About(
        name=recipe.name,
        version=recipe.version,
        description=f"Classifies an image as one of {len(split.base_names)} classes. Trained on {split.description}.",
        author="FieldViT",
        licence=_licence(recipe),
    )


def _add_head(draft: _Draft, precision: str, head: FittedHead, features_of: ArrayOf) -> None:
    """The learner's state, held-out features for the guard, and what drift is measured against."""
    held_out = draft.split.validation.take(_some_of_each(draft.split.validation.labels, GUARD_IMAGES))
    guard = over_images(features_of, held_out.images, draft.spec)
    arrays = {
        **head.learner.state(),
        "guard_features": guard.astype(np.float32),
        "guard_labels": held_out.labels.astype(np.int64),
        "feature_mean": head.features.mean(axis=0).astype(np.float32),
        "feature_std": head.features.std(axis=0).astype(np.float32),
    }
    draft.heads |= {f"{precision}/{name}": value for name, value in arrays.items()}


def _add_golden(draft: _Draft, precision: str, head: LinearHead, features_of: ArrayOf) -> None:
    features = over_images(features_of, draft.golden["frames"], draft.spec)
    draft.golden |= {f"{precision}/features": features, f"{precision}/logits": head.logits(features)}


def _golden_frames(split: ImageSplits, spec: InputSpec) -> np.ndarray:
    """A few real frames of the base classes, uint8 [n, h, w, C], from the validation images."""
    chosen = _some_of_each(split.validation.labels, GOLDEN_FRAMES)
    return same_size([split.validation.images[int(index)] for index in chosen], spec)


def _some_of_each(labels: np.ndarray, most: int) -> np.ndarray:
    """The first images of every class, an equal number of each and about `most` in all; of many classes, some."""
    classes = np.unique(labels)
    share = max(most // len(classes), 1)
    return np.concatenate([np.flatnonzero(labels == label)[:share] for label in classes[:most]])


def _add_coreml(draft: _Draft, model: nn.Module, head: LinearHead) -> None:
    path, form = draft.out / COREML_PATH, draft.recipe.export.coreml
    deployed = model.deploy()
    head.bake_into(deployed)
    package = Package(
        model=deployed,
        spec=draft.spec,
        labels=draft.split.base_names,
        calibration=lambda: calibration_frames(draft.recipe),
        board=load_board(draft.recipe.export.boards[0]),
    )
    write_package(package, form, path)
    max_drop = draft.recipe.quantize.max_accuracy_drop
    require_accuracy(path, form, lambda: _reference(model, head, draft.split.validation, draft.spec), max_drop)
    proof = prove_coreml(path, draft.reference)
    proof.require(coreml_name(form))
    draft.coreml = CoreMLArtifact(
        form=form,
        path=COREML_PATH,
        argmax_agreement=proof.argmax_agreement,
        min_cosine=proof.min_cosine,
        max_abs_difference=proof.max_abs_difference,
    )
    draft.files[COREML_PATH] = path


def _add_projectors(draft: _Draft) -> None:
    """The ways from the backbones of earlier bundles to those of this one."""
    train, held_out = parts_of(draft.split, balanced(draft.split.train.labels, seed=draft.recipe.seed))
    ours = list(run_backbones(draft.run / "quantize", draft.artifacts, draft.spec, train, held_out))
    done = {artifact.backbone for artifact in draft.artifacts}
    for bundle in draft.recipe.export.migrate_from:
        earlier = [b for b in features_of_earlier(Path(bundle), train, held_out) if b.artifact.backbone not in done]
        done |= {backbone.artifact.backbone for backbone in earlier}
        for entry, content in learn_projectors(earlier, ours, train.labels):
            draft.projectors.append(entry)
            draft.files[entry.path] = content


def _require_budgets(draft: _Draft) -> None:
    entries = describe(draft.files)
    sizes = {artifact.precision: entries[artifact.path].bytes for artifact in draft.artifacts}
    coreml_bytes = sum(entry.bytes for name, entry in entries.items() if name.startswith(f"{COREML_PATH}/"))
    for name in draft.recipe.export.boards:
        require_budget(load_board(name), sizes, coreml_bytes=coreml_bytes)


def _write(draft: _Draft) -> str:
    draft.files |= {"head.npz": deterministic_npz(draft.heads), "golden.npz": deterministic_npz(draft.golden)}
    draft.files["labels.txt"] = ("\n".join(draft.split.base_names) + "\n").encode()
    licence = _licence(draft.recipe)
    provenance = {
        "recipe": draft.recipe.table(),
        "recipe_sha256": draft.recipe.digest(),
        "weights_sha256": sha256_of(draft.run / "train" / WEIGHTS),
        "data": draft.split.description,
        "commit": _commit(),
        "packages": package_versions(),
    }
    if draft.recipe.model.pretrained:
        provenance["pretrained"] = stage_metrics(draft.run, "train")["pretrained"] | {"licence": licence}
    draft.files["model_card.md"] = model_card(
        draft.recipe, draft.split, draft.artifacts, draft.coreml, provenance, licence
    ).encode()
    draft.files["ml-bom.json"] = ml_bom(draft.recipe, provenance, licence).encode()
    manifest = Manifest(
        name=draft.recipe.name,
        version=draft.recipe.version,
        release=draft.recipe.release,
        task=draft.recipe.task,
        labels=draft.split.base_names,
        boards=draft.recipe.export.boards,
        input=draft.spec,
        artifacts=tuple(draft.artifacts),
        coreml=draft.coreml,
        learning=_learning_spec(draft),
        float_accuracy=_float_accuracy(draft),
        licence=licence,
        provenance=provenance,
        files=describe(draft.files),
        projectors=tuple(draft.projectors),
        schema=PROJECTOR_SCHEMA if draft.projectors else SCHEMA_VERSION,
    )
    files = {**draft.files, MANIFEST_NAME: manifest.to_json().encode()}
    return write_bundle(files, draft.out / bundle_name(draft.recipe))


def _learning_spec(draft: _Draft) -> LearningSpec:
    continual = draft.recipe.continual
    return LearningSpec(
        method=continual.method,
        feature_dim=draft.reference.features.shape[1],
        max_classes=continual.max_classes,
        max_drop=continual.max_drop,
        shrinkage=continual.shrinkage,
    )


def _licence(recipe: Recipe) -> str:
    model = recipe.model
    if not model.pretrained:
        return OWN_LICENCE
    return spdx(weights_licence(model_entry(model), path=model.weights, stated=model.licence))


def _commit() -> str:
    """The commit of the code that built this, marked where files differ from it; "unknown" outside our own checkout."""
    root = Path(__file__).resolve().parents[2]
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return "unknown"
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return _git(root, "rev-parse", "HEAD") + (" with changes" if changes else "")


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
