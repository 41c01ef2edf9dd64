"""The proof that an artifact answers as the float model does: accuracy, agreement, cosine, largest difference.

Agreement and accuracy compare answers, each precision with the head fitted to its own features; cosine and difference
compare the features themselves (Core ML: the logits, which is what an app gets from it).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from converters.errors import ParityError
from converters.isolate import opened
from converters.parity import compare
from converters.runners import open_classifier, open_features
from device.contract.manifest import InputSpec
from host.data.splits import LabeledImages
from host.quantize.spec import HALF
from host.stages.features import ArrayOf, coreml_logits, over_images
from host.stages.head import LinearHead

MIN_AGREEMENT = {"float32": 0.999, "float16": 0.995, "coreml": 0.995}
MIN_AGREEMENT_QUANTIZED = 0.9
"""Least share of the same answers as the float model; of thousands of images one or two lie on a border, and so may one
of a few. What rounds activations is held to its accuracy as well; below 0.9 it has collapsed."""

MIN_COSINE = {"float32": 0.9999, "float16": 0.9999}
MAX_DIFFERENCE = {"float32": 2e-4}
"""Largest difference of a feature, as a share of the largest feature: measured 3e-5 at most on any family, while a
wrong weight that no answer shows yet is above."""

BORDER_COSINE = 0.99
INFER_PATH = "model.infer.tflite"
COREML_IMAGES = 500
"""Its program is evaluated in Python here, some tens of milliseconds an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the float model says about some real images: the images with their labels, features, logits."""

    images: LabeledImages
    spec: InputSpec
    features: np.ndarray  # float32 [N, D]
    logits: np.ndarray  # float32 [N, K]

    def every(self, step: int) -> Self:
        """Of every `step` images the first."""
        chosen = np.arange(0, len(self.images), step)
        return replace(
            self, images=self.images.take(chosen), features=self.features[chosen], logits=self.logits[chosen]
        )

    def over(self, compute: ArrayOf) -> np.ndarray:
        """What `compute` gives for these images."""
        return over_images(compute, self.images.images, self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """An artifact's figures over all images of the reference; shares in 0..1."""

    accuracy: float
    argmax_agreement: float
    min_cosine: float
    max_abs_difference: float
    max_relative_difference: float  # as a share of the reference's largest value
    images: int

    def require(self, artifact: str) -> None:
        """Raise ParityError if the artifact answers otherwise than the float model more often than it may."""
        for problem in self.problems(artifact):
            raise ParityError(f"{artifact}: {problem}, over {self.images} images; do not ship it")

    def problems(self, artifact: str) -> tuple[str, ...]:
        """What is out of bounds, in words."""
        found = []
        bound = min_agreement(artifact)
        if self.argmax_agreement < bound and not self._is_one_on_a_border():
            found.append(f"argmax agreement {self.argmax_agreement:.4f} is below {bound}")
        if self.min_cosine < MIN_COSINE.get(artifact, -1.0):
            found.append(f"lowest cosine {self.min_cosine:.6f} is below {MIN_COSINE[artifact]}")
        if self.max_relative_difference > MAX_DIFFERENCE.get(artifact, np.inf):
            allowed = MAX_DIFFERENCE[artifact]
            found.append(
                f"features differ by {self.max_relative_difference:.2g} of the largest, {allowed:.2g} is allowed"
            )
        return tuple(found)

    def _is_one_on_a_border(self) -> bool:
        """Whether a single image is answered otherwise, and by numbers that hardly differ."""
        return round((1 - self.argmax_agreement) * self.images) <= 1 and self.min_cosine >= BORDER_COSINE


def min_agreement(artifact: str) -> float:
    """The least share of the same answers that an artifact may have."""
    return MIN_AGREEMENT.get(artifact, MIN_AGREEMENT_QUANTIZED)


def coreml_name(form: str) -> str:
    """What a form of the Core ML package is called in reports; it chooses the bounds."""
    return "coreml" if form == HALF else f"coreml {form}"


def prove_tflite(path: Path, head: LinearHead, reference: Reference) -> Proof:
    """Run a TFLite artifact over the reference's images in LiteRT, in a process of its own, and compare."""
    with opened(open_features, path) as features_of:
        features = reference.over(features_of)
    return _proof(reference, logits=head.logits(features), own=features, expected=reference.features)


def prove_infer(path: Path, reference: Reference) -> Proof:
    """Run the image-to-logits file for other tools over the reference's images, as above, and compare."""
    with opened(open_classifier, path) as logits_of:
        logits = reference.over(logits_of)
    return _proof(reference, logits=logits, own=logits, expected=reference.logits)


def prove_coreml(path: Path, reference: Reference) -> Proof:
    """Evaluate the saved Core ML program over the reference's images, over `COREML_IMAGES` of many, and compare."""
    reference = reference.every(max(len(reference.images) // COREML_IMAGES, 1))
    with opened(coreml_logits, path) as logits_of:
        logits = reference.over(logits_of)
    return _proof(reference, logits=logits, own=logits, expected=reference.logits)


def _proof(reference: Reference, *, logits: np.ndarray, own: np.ndarray, expected: np.ndarray) -> Proof:
    answers = compare(reference.logits, logits)
    values = compare(expected, own)
    return Proof(
        accuracy=float((logits.argmax(axis=1) == reference.images.labels).mean()),
        argmax_agreement=answers.argmax_agreement,
        min_cosine=values.min_cosine,
        max_abs_difference=values.max_abs_difference,
        max_relative_difference=values.max_abs_difference / max(float(np.abs(expected).max()), 1e-30),
        images=values.images,
    )
