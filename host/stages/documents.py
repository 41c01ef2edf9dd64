"""The model card and the bill of materials of a bundle: what a person and an auditor want to know."""

import json
from collections.abc import Sequence
from typing import Any

from device.contract.manifest import Artifact, CoreMLArtifact
from host.data.splits import ImageSplits
from host.recipe import Recipe


def model_card(
    recipe: Recipe,
    split: ImageSplits,
    artifacts: Sequence[Artifact],
    coreml: CoreMLArtifact | None,
    provenance: dict[str, Any],
) -> str:
    """Markdown: what the model is for, what it was trained on, how exact each artifact is, what it cannot do."""
    rows = [
        f"| {artifact.path} | {artifact.accuracy:.4f} | {artifact.argmax_agreement:.4f} | {artifact.min_cosine:.6f} |"
        for artifact in artifacts
    ]
    if coreml:
        rows.append(
            f"| {coreml.path} (float16, evaluated from the saved program) | - | {coreml.argmax_agreement:.4f} | {coreml.min_cosine:.6f} |"
        )
    lines = [
        f"# {recipe.name} {recipe.version}",
        "",
        f"Classifies {', '.join(split.base_names)}; may learn more classes on the board ({recipe.continual.method}).",
        "",
        f"- Model: {recipe.model.family} {recipe.model.variant}, trained with seed {recipe.seed}",
        f"- Data: {provenance['data']}",
        f"- Recipe SHA-256: {provenance['recipe_sha256']}",
        f"- Commit: {provenance['commit']}",
        "",
        "| artifact | accuracy, test images of the base classes | argmax agreement with PyTorch | lowest cosine |",
        "|---|---|---|---|",
        *rows,
        "",
        "Accuracy is that of LiteRT on the host; a board's own figure is in its telemetry. Frames of other things than the",
        "classes above get one of these labels all the same.",
    ]
    return "\n".join(lines) + "\n"


def ml_bom(recipe: Recipe, provenance: dict[str, Any], licence: str) -> str:
    """A CycloneDX 1.6 ML bill of materials, without times or random identifiers."""
    components = [
        {
            "type": "library",
            "name": name,
            "version": version,
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "purl": f"pkg:pypi/{name}@{version}",
        }
        for name, version in sorted(provenance["packages"].items())
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": f"{recipe.name}@{recipe.version}",
        "name": recipe.name,
        "version": recipe.version,
        "licenses": [{"license": {"id": licence}}],
        "hashes": [{"alg": "SHA-256", "content": provenance["weights_sha256"]}],
        "modelCard": {
            "modelParameters": {
                "task": recipe.task,
                "architectureFamily": recipe.model.family,
                "modelArchitecture": recipe.model.variant,
                "datasets": [{"type": "dataset", "name": recipe.data.source, "description": provenance["data"]}],
            }
        },
    }
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": components,
    }
    return json.dumps(bom, indent=1, sort_keys=True) + "\n"
