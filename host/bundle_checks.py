"""What `fieldvit verify` measures of a bundle, on the real test images of its recipe's data.

The reference is the trained PyTorch model of the run that made the bundle, known by the hash of its weights. Where that
run is not at hand, it is the bundle's own float32 TFLite file, and the report says so.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from converters.environments import ONNX2TF
from converters.errors import ParityError
from converters.isolate import opened
from converters.layers import LayerReport
from converters.runners import open_features
from converters.torch_trace import trace
from device.contract.bundle import extract
from device.contract.errors import ArtifactError
from device.contract.manifest import Artifact, Manifest
from device.contract.records import from_table
from device.preprocess import preprocess
from host.artifact_checks import INFER, ArtifactCheck, Examiner
from host.cross_checks import CrossCheck, check_runtimes, check_second_route
from host.errors import RecipeError
from host.files import sha256_of
from host.quantize.spec import FLOAT
from host.recipe import Recipe
from host.stages.data import base_test_images, input_spec, load_model, load_split
from host.stages.features import over_images, torch_features
from host.stages.head import LinearHead, fit_head, load_head
from host.stages.proof import INFER_PATH, Proof, Reference, coreml_name, min_agreement

CHECK_COLUMNS = (
    "artifact",
    "accuracy",
    "argmax agreement",
    "lowest cosine",
    "largest difference",
    "required",
    "verdict",
)
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
            f"agreement {min_agreement(self.artifact):.1%}",
            "; ".join(self.problems) or ("the reference itself" if self.is_reference else "passed"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """All checks of a bundle, and what they were compared with."""

    bundle: str
    reference: str
    images: int
    checks: tuple[Check, ...]
    layers: tuple[LayerReport, ...]
    cross_checks: tuple[CrossCheck, ...] = ()

    def require_passed(self) -> None:
        """Raise ParityError naming every artifact that failed."""
        failed = [f"{check.artifact}: {'; '.join(check.problems)}" for check in self.checks if check.problems]
        if failed:
            raise ParityError(
                f"{self.bundle} differs from {self.reference}: {' | '.join(failed)}; do not ship it, export again"
            )
        odd = [
            f"{check.artifact} in {check.checked_with}: {check.problem}" for check in self.cross_checks if check.problem
        ]
        if odd:
            raise ParityError(f"{self.bundle}: {' | '.join(odd)}; do not ship that artifact where that tool is used")


def verify_bundle(
    bundle: Path, runs: Path, *, with_layers: bool = False, second_route: bool = False, runtimes: bool = False
) -> VerifyReport:
    """Compare every artifact of a bundle with the float reference.

    Args:
        bundle: NAME-VERSION.fieldvit.
        runs: where the run that made it is looked for.
        with_layers: compare the tensors of the float32 file with PyTorch's too, where the run is at hand; those of
            quantized files are always compared with the float32 file's.
        second_route: convert the trained model by onnx2tf too, and compare the float32 file with what comes out.
        runtimes: run the TFLite files in tflite-runtime and `tf.lite` too, where those are installed.

    Raises:
        ArtifactError: the bundle is damaged or its recipe cannot be read.
        ConversionError: an artifact cannot be read, or kills the process that interprets it.
        MissingEnvironmentError: the second route is wanted, and not installed.
        RecipeError: the second route is wanted, and the run with the trained model is not at hand.
    """
    if second_route:
        ONNX2TF.require()  # before minutes of other checks
    with tempfile.TemporaryDirectory(prefix="fieldvit-verify-") as temporary:
        directory = Path(temporary)
        manifest = extract(bundle, directory)
        recipe = recipe_of(manifest)
        model = _model(recipe, manifest, runs)
        if second_route and model is None:
            raise RecipeError(
                f"--second-route converts the trained model, and {_weights(recipe, runs)} is not what {bundle.name} was "
                "made from; give the folder of its run: --runs"
            )
        examiner = _examiner(recipe, manifest, directory, model)
        deployed = model.deploy() if with_layers and model is not None else None
        if deployed is not None:
            examiner = replace(examiner, traced=trace(deployed, examiner.images()))
        heads = {artifact.precision: _head(directory, artifact.precision, manifest) for artifact in manifest.artifacts}
        heads[INFER] = heads[manifest.artifacts[0].precision]  # what it was made from
        files = {artifact.precision: directory / artifact.path for artifact in manifest.artifacts}
        found = {
            name: examiner.check(path, name, heads[name])
            for name, path in {**files, INFER: directory / INFER_PATH}.items()
        }
        checks = [_check(name, check, manifest, recipe, directory) for name, check in found.items()]
        if model is None:
            checks = [replace(check, is_reference=check.artifact == FLOAT) for check in checks]
        layers = [check.layers for check in found.values() if check.layers]
        if manifest.coreml:
            if deployed is not None and model is not None:  # Core ML has the head of PyTorch's own features
                fit_head(recipe, load_split(recipe), input_spec(recipe), torch_features(model)).linear.bake_into(
                    deployed
                )
            check = examiner.check_coreml(directory / manifest.coreml.path, manifest.coreml.form, deployed)
            checks.append(Check(artifact=coreml_name(manifest.coreml.form), proof=check.proof, problems=check.problems))
            layers += [check.layers] if check.layers else []
        cross_checks = []
        if second_route and model is not None:
            cross_checks.append(check_second_route(model, files[FLOAT], examiner.reference))
        if runtimes:
            cross_checks += check_runtimes({**files, INFER: directory / INFER_PATH}, manifest, examiner.reference)
        return VerifyReport(
            bundle=bundle.name,
            reference=OWN_FLOAT if model is None else f"the PyTorch model {_weights(recipe, runs)}",
            images=len(examiner.reference.images),
            checks=tuple(checks),
            layers=tuple(layers),
            cross_checks=tuple(cross_checks),
        )


def recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that a bundle was made by, from its provenance."""
    table = manifest.provenance.get("recipe")
    return from_table(Recipe, table or {}, where=f"{manifest.name}: provenance.recipe", error=ArtifactError)


def _weights(recipe: Recipe, runs: Path) -> Path:
    return runs / recipe.name / "train" / "model.safetensors"


def _model(recipe: Recipe, manifest: Manifest, runs: Path) -> nn.Module | None:
    """The trained model of the run that made the bundle; None where that run is not at hand."""
    weights = _weights(recipe, runs)
    if weights.exists() and sha256_of(weights) == manifest.provenance.get("weights_sha256"):
        return load_model(recipe, weights)
    return None


def _examiner(recipe: Recipe, manifest: Manifest, directory: Path, model: nn.Module | None) -> Examiner:
    images, spec = base_test_images(load_split(recipe)), input_spec(recipe)
    float_path = directory / manifest.artifact(FLOAT).path
    if model is not None:
        features = over_images(torch_features(model), images.images, spec)
    else:
        with opened(open_features, float_path) as features_of:
            features = over_images(features_of, images.images, spec)
    logits = _head(directory, FLOAT, manifest).logits(features)
    reference = Reference(images=images, spec=manifest.input, features=features, logits=logits)
    return Examiner(reference=reference, spec=spec, float_path=float_path)


def _head(directory: Path, precision: str, manifest: Manifest) -> LinearHead:
    return load_head(directory / "head.npz", precision, shrinkage=manifest.learning.shrinkage)


def _check(name: str, check: ArtifactCheck, manifest: Manifest, recipe: Recipe, directory: Path) -> Check:
    problems = list(check.problems)
    if name != INFER:
        problems += _golden_problems(manifest.artifact(name), directory, manifest)
        drop = manifest.float_accuracy - check.proof.accuracy
        if drop > recipe.quantize.max_accuracy_drop:
            problems.append(f"accuracy is {drop:.4f} below float, {recipe.quantize.max_accuracy_drop:.4f} is allowed")
    return Check(artifact=name, proof=check.proof, problems=tuple(problems))


def _golden_problems(artifact: Artifact, directory: Path, manifest: Manifest) -> tuple[str, ...]:
    with np.load(directory / "golden.npz", allow_pickle=False) as golden:
        frames, expected = golden["frames"], golden[f"{artifact.precision}/features"]
    with opened(open_features, directory / artifact.path) as features_of:
        features = features_of(preprocess(frames, manifest.input))
    difference, allowed = np.abs(features - expected).max(), artifact.golden_tolerance * np.abs(expected).max()
    return () if difference <= allowed else (f"golden outputs differ by {difference:.3g}, {allowed:.3g} is allowed",)
