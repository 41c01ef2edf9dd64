"""Projectors for boards that have learned on an earlier bundle: `export.migrate_from` of a recipe.

One file for each backbone of an earlier bundle and each artifact of this one, because a board's features are those of the
artifact that it runs, int8 rounding included, and which one it runs is its own choice.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from converters.runners import open_features
from device.contract.bundle import extract
from device.contract.manifest import Artifact, InputSpec, Manifest, ProjectorEntry
from device.learning.projector import Projector
from host.continual.projector import class_means, fit_projector, measure_fit
from host.data.splits import ImageSplits, LabeledImages
from host.errors import HostError
from host.files import deterministic_npz
from host.stages.features import over_images

SHORT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """One artifact and its features float32 [n, D] of the images to learn on, and of those held out."""

    artifact: Artifact
    features: np.ndarray
    held_out: np.ndarray


def features_of_earlier(bundle: Path, train: LabeledImages, held_out: LabeledImages) -> list[Backbone]:
    """Every backbone of an earlier bundle, run as on a board, with the pre-processing that it wants.

    Raises:
        ArtifactError: it is no bundle.
        HostError: it takes images with another number of channels.
    """
    with tempfile.TemporaryDirectory(prefix="fieldvit-earlier-") as name:
        manifest = extract(bundle, Path(name))
        _require_channels(manifest, train, bundle)
        return list(run_backbones(Path(name), manifest.artifacts, manifest.input, train, held_out))


def run_backbones(
    directory: Path, artifacts: Sequence[Artifact], spec: InputSpec, train: LabeledImages, held_out: LabeledImages
) -> Iterator[Backbone]:
    """Each artifact in `directory` on both parts; of artifacts with the same backbone, one."""
    for artifact in {artifact.backbone: artifact for artifact in artifacts}.values():
        features_of = open_features(directory / artifact.path)
        yield Backbone(
            artifact=artifact,
            features=over_images(features_of, train.images, spec),
            held_out=over_images(features_of, held_out.images, spec),
        )


def learn_projectors(
    earlier: Sequence[Backbone], ours: Sequence[Backbone], labels: np.ndarray
) -> Iterator[tuple[ProjectorEntry, bytes]]:
    """A projector, as the manifest lists it and as the bundle holds it, for each way from an earlier backbone to ours.

    Args:
        earlier: backbones of earlier bundles.
        ours: those of this one.
        labels: of the images to learn on, [n]; only `head_agreement` is measured with them.
    """
    for old in earlier:
        for new in ours:
            if old.artifact.backbone != new.artifact.backbone:
                yield _learn(old, new, labels)


def _learn(old: Backbone, new: Backbone, labels: np.ndarray) -> tuple[ProjectorEntry, bytes]:
    projector = _as_stored(fit_projector(old.features, new.features))
    means = class_means(new.features, labels)
    mean = new.features.mean(axis=0, dtype=np.float64)
    fit = measure_fit(projector, old=old.held_out, new=new.held_out, means=means, mean=mean)
    ends = {"from_backbone": old.artifact.backbone, "to_backbone": new.artifact.backbone}
    path = f"projector-{ends['from_backbone'][:SHORT]}-{ends['to_backbone'][:SHORT]}.npz"
    arrays = {"backbones": np.array(list(ends.values()))}
    arrays |= {name: getattr(projector, name).astype(np.float32) for name in ("weight", "bias", "residual")}
    return ProjectorEntry(path=path, **ends, **asdict(fit)), deterministic_npz(arrays)


def _as_stored(projector: Projector) -> Projector:
    """With the numbers that a bundle holds, so that what is measured is what is shipped."""
    arrays = (projector.weight, projector.bias, projector.residual)
    return Projector(*(array.astype(np.float32).astype(np.float64) for array in arrays))


def _require_channels(manifest: Manifest, images: LabeledImages, bundle: Path) -> None:
    channels = images.images[0].shape[-1]
    if manifest.input.channels != channels:
        raise HostError(
            f"{bundle}: takes images of {manifest.input.channels} channels, this recipe's have {channels}; "
            "what was learned on it cannot be moved"
        )


def parts_of(split: ImageSplits, chosen: np.ndarray) -> tuple[LabeledImages, LabeledImages]:
    """The images to learn a projector on, and those to judge it by.

    Raises:
        HostError: there are no validation images.
    """
    if not len(split.validation):
        raise HostError("export.migrate_from needs validation images to judge the projectors by; give the data some")
    return split.train.take(chosen), split.validation
