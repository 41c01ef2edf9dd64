"""What `fieldvit verify` measures of a bundle, on the real test images of its recipe's data.

The reference is the trained PyTorch model of the run that made the bundle, known by the hash of its weights. Where that
run is not at hand, it is the bundle's own float32 TFLite file, and the report says so.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converters.errors import ParityError
from device.contract.bundle import extract
from device.contract.errors import ArtifactError
from device.contract.manifest import Artifact, Manifest
from device.contract.records import from_table
from device.engine import Engine
from device.preprocess import preprocess
from host.files import sha256_of
from host.recipe import Recipe
from host.stages.data import base_test_images, load_model, load_split
from host.stages.features import tflite_features, torch_features
from host.stages.head import load_head
from host.stages.proof import INFER_PATH, MIN_AGREEMENT, Proof, Reference, prove_coreml, prove_infer, prove_tflite

CHECK_COLUMNS = (
    "artifact",
    "accuracy",
    "argmax agreement",
    "lowest cosine",
    "largest difference",
    "required",
    "verdict",
)
FLOAT = "float32"
OWN_FLOAT = "the bundle's own float32 file, because the run that made it is not at hand (--runs)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One artifact's figures, and what is wrong with them, if anything."""

    artifact: str
    proof: Proof
    problems: tuple[str, ...]
    is_reference: bool = False

    def row(self) -> tuple[str, ...]:
        proof = self.proof
        figures = (f"{proof.accuracy:.2%}", f"{proof.argmax_agreement:.2%}", f"{proof.min_cosine:.6f}")
        return (
            self.artifact,
            *figures,
            f"{proof.max_abs_difference:.2e}",
            f"agreement {MIN_AGREEMENT[self.artifact]:.1%}",
            "; ".join(self.problems) or ("the reference itself" if self.is_reference else "passed"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """All checks of a bundle, and what they were compared with."""

    bundle: str
    reference: str
    images: int
    checks: tuple[Check, ...]

    def require_passed(self) -> None:
        """Raise ParityError naming every artifact that failed."""
        failed = [f"{check.artifact}: {'; '.join(check.problems)}" for check in self.checks if check.problems]
        if failed:
            raise ParityError(
                f"{self.bundle} differs from {self.reference}: {' | '.join(failed)}; do not ship it, export again"
            )


def verify_bundle(bundle: Path, runs: Path) -> VerifyReport:
    """Compare every artifact of a bundle with the float reference.

    Raises:
        ArtifactError: the bundle is damaged or its recipe cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="fieldvit-verify-") as temporary:
        directory = Path(temporary)
        manifest = extract(bundle, directory)
        recipe = recipe_of(manifest)
        reference, what = _reference(recipe, manifest, directory, runs)
        checks = [_check_tflite(artifact, manifest, recipe, directory, reference) for artifact in manifest.artifacts]
        if what == OWN_FLOAT:
            checks = [replace(check, is_reference=check.artifact == FLOAT) for check in checks]
        proof = prove_infer(directory / INFER_PATH, reference)
        checks.append(Check(artifact="infer", proof=proof, problems=proof.problems("infer")))
        if manifest.coreml:
            proof = prove_coreml(directory / manifest.coreml.path, reference)
            checks.append(Check(artifact="coreml", proof=proof, problems=proof.problems("coreml")))
        return VerifyReport(bundle=bundle.name, reference=what, images=len(reference.images), checks=tuple(checks))


def recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that a bundle was made by, from its provenance."""
    table = manifest.provenance.get("recipe")
    return from_table(Recipe, table or {}, where=f"{manifest.name}: provenance.recipe", error=ArtifactError)


def _reference(recipe: Recipe, manifest: Manifest, directory: Path, runs: Path) -> tuple[Reference, str]:
    images, labels = base_test_images(load_split(recipe), manifest.input)
    weights = runs / recipe.name / "train" / "model.safetensors"
    head = load_head(directory / "head.npz", FLOAT, shrinkage=manifest.learning.shrinkage)
    if weights.exists() and sha256_of(weights) == manifest.provenance.get("weights_sha256"):
        features, what = torch_features(load_model(recipe, weights), images), f"the PyTorch model {weights}"
    else:
        features = tflite_features(directory / manifest.artifact(FLOAT).path, images)
        what = OWN_FLOAT
    return Reference(images=images, labels=labels, features=features, logits=head.logits(features)), what


def _check_tflite(
    artifact: Artifact, manifest: Manifest, recipe: Recipe, directory: Path, reference: Reference
) -> Check:
    path, head = (
        directory / artifact.path,
        load_head(directory / "head.npz", artifact.precision, shrinkage=manifest.learning.shrinkage),
    )
    proof = prove_tflite(path, head, reference)
    problems = [*proof.problems(artifact.precision), *_golden_problems(artifact, directory, manifest)]
    drop = manifest.float_accuracy - proof.accuracy
    if drop > recipe.quantize.max_accuracy_drop:
        problems.append(f"accuracy is {drop:.4f} below float, {recipe.quantize.max_accuracy_drop:.4f} is allowed")
    return Check(artifact=artifact.precision, proof=proof, problems=tuple(problems))


def _golden_problems(artifact: Artifact, directory: Path, manifest: Manifest) -> tuple[str, ...]:
    with np.load(directory / "golden.npz", allow_pickle=False) as golden:
        frames, expected = golden["frames"], golden[f"{artifact.precision}/features"]
    engine = Engine(directory / artifact.path)
    features = np.stack([engine.features(image[None]) for image in preprocess(frames, manifest.input)])
    difference, allowed = np.abs(features - expected).max(), artifact.golden_tolerance * np.abs(expected).max()
    return () if difference <= allowed else (f"golden outputs differ by {difference:.3g}, {allowed:.3g} is allowed",)
