"""The model card and the bill of materials of a bundle: what a person and an auditor want to know."""

import json
from collections.abc import Sequence
from typing import Any

from device.contract.manifest import Artifact, CoreMLArtifact
from host.data.splits import ImageSplits
from host.recipe import Recipe

_SPDX_IDS = (
    *("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MPL-2.0", "GPL-3.0-only", "AGPL-3.0-only"),
    *("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"),
)
"""Identifiers that weights are published under; CycloneDX takes any other licence by its name."""


def spdx(licence: str) -> str:
    """A licence as SPDX spells it, which hubs write in small letters; unchanged where we know no such identifier."""
    return next((known for known in _SPDX_IDS if known.lower() == licence.lower()), licence)


def model_card(
    recipe: Recipe,
    split: ImageSplits,
    artifacts: Sequence[Artifact],
    coreml: CoreMLArtifact | None,
    provenance: dict[str, Any],
    licence: str,
) -> str:
    """Markdown: what the model is for, what it was trained on, how exact each artifact is, what it cannot do."""
    rows = [
        f"| {artifact.path} | {artifact.accuracy:.4f} | {artifact.argmax_agreement:.4f} | {artifact.min_cosine:.6f} |"
        for artifact in artifacts
    ]
    if coreml:
        rows.append(
            f"| {coreml.path} ({coreml.form}, evaluated from the saved program) | - | {coreml.argmax_agreement:.4f} | {coreml.min_cosine:.6f} |"
        )
    lines = [
        f"# {recipe.name} {recipe.version}",
        "",
        f"Classifies {', '.join(split.base_names)}; may learn more classes on the board ({recipe.continual.method}).",
        "",
        f"- Model: {recipe.model.family} {recipe.model.variant}, trained with seed {recipe.seed}",
        *_origin_lines(recipe, provenance, licence),
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


def _origin_lines(recipe: Recipe, provenance: dict[str, Any], licence: str) -> list[str]:
    """Options of one's own, weights that training started from, and the licence."""
    lines = [f"- Options: {json.dumps(recipe.model.options, sort_keys=True)}"] if recipe.model.options else []
    if "pretrained" in provenance:
        lines.append("- Training started from {source}, SHA-256 {sha256}".format(**provenance["pretrained"]))
        return [*lines, f"- Licence, that of the weights it started from: {licence}"]
    return [*lines, f"- Licence: {licence}"]


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
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"{recipe.name}@{recipe.version}",
        "name": recipe.name,
        "version": recipe.version,
        "licenses": [_licence(licence)],
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
    if "pretrained" in provenance:
        model["pedigree"] = {"ancestors": [_ancestor(**provenance["pretrained"])]}
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": components,
    }
    return json.dumps(bom, indent=1, sort_keys=True) + "\n"


def _licence(licence: str) -> dict[str, Any]:
    return {"license": {"id" if licence in _SPDX_IDS else "name": licence}}


def _ancestor(*, source: str, sha256: str, licence: str) -> dict[str, Any]:
    """The weights that training started from, as a component."""
    return {
        "type": "machine-learning-model",
        "name": source,
        "licenses": [_licence(licence)],
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    }
