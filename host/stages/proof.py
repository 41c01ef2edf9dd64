"""The proof that an artifact answers as the float model does: accuracy, agreement, cosine, largest difference.

Agreement and accuracy compare answers, each precision with the head fitted to its own features; cosine and difference
compare the features themselves (Core ML: the logits, which is what an app gets from it).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.errors import ParityError
from converters.gates import classifier_logits
from converters.parity import compare
from host.stages.features import coreml_logits, tflite_features
from host.stages.head import LinearHead

MIN_AGREEMENT = {"float32": 1.0, "coreml": 0.995, "int8": 0.9, "infer": 0.9}
"""Least share of the same answers as the float model. int8 is held to its accuracy as well; below 0.9 it has collapsed."""

INFER_PATH = "model.infer.tflite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the float model says about some real images: pre-processed images, truth, features, logits."""

    images: np.ndarray  # float32 [N, H, W, C]
    labels: np.ndarray  # int64 [N]
    features: np.ndarray  # float32 [N, D]
    logits: np.ndarray  # float32 [N, K]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """An artifact's figures over all images of the reference; shares in 0..1."""

    accuracy: float
    argmax_agreement: float
    min_cosine: float
    max_abs_difference: float
    images: int

    def require(self, artifact: str) -> None:
        """Raise ParityError if the artifact answers otherwise than the float model more often than it may."""
        for problem in self.problems(artifact):
            raise ParityError(f"{artifact}: {problem}, over {self.images} images; do not ship it")

    def problems(self, artifact: str) -> tuple[str, ...]:
        """What is out of bounds, in words."""
        bound = MIN_AGREEMENT[artifact]
        return (
            ()
            if self.argmax_agreement >= bound
            else (f"argmax agreement {self.argmax_agreement:.4f} is below {bound}",)
        )


def prove_tflite(path: Path, head: LinearHead, reference: Reference) -> Proof:
    """Run a TFLite artifact over the reference's images in LiteRT and compare."""
    features = tflite_features(path, reference.images)
    return _proof(reference, logits=head.logits(features), own=features, expected=reference.features)


def prove_infer(path: Path, reference: Reference) -> Proof:
    """Run the image-to-logits file for other tools over the reference's images in LiteRT and compare."""
    logits = classifier_logits(path, reference.images)
    return _proof(reference, logits=logits, own=logits, expected=reference.logits)


def prove_coreml(path: Path, reference: Reference) -> Proof:
    """Evaluate the saved Core ML program over the reference's images and compare."""
    logits = coreml_logits(path, reference.images)
    return _proof(reference, logits=logits, own=logits, expected=reference.logits)


def _proof(reference: Reference, *, logits: np.ndarray, own: np.ndarray, expected: np.ndarray) -> Proof:
    answers = compare(reference.logits, logits)
    values = compare(expected, own)
    return Proof(
        accuracy=float((logits.argmax(axis=1) == reference.labels).mean()),
        argmax_agreement=answers.argmax_agreement,
        min_cosine=values.min_cosine,
        max_abs_difference=values.max_abs_difference,
        images=values.images,
    )
