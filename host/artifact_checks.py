"""What is wrong with one artifact: its answers, its features, its record of pre-processing, its operations.

An artifact is refused for more than other answers: a wrong bias may change none of a few hundred, and a board meets more.
So float32 features must be PyTorch's up to rounding, and each operation of a quantized file must be, up to its own
rounding, what float32 makes of the same inputs (`converters.layers_tflite`).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from converters import coreml, flatbuffer
from converters.layers import LayerReport
from converters.layers_coreml import compare_package
from converters.layers_tflite import compare_float, compare_quantized
from converters.torch_trace import TracedTensor
from device.contract.errors import ArtifactError
from device.contract.manifest import InputSpec
from device.contract.records import from_table, to_table
from host.data.inputs import to_input
from host.quantize.spec import FLOAT, HALF
from host.stages.head import LinearHead
from host.stages.proof import Proof, Reference, coreml_name, prove_coreml, prove_infer, prove_tflite

LAYER_IMAGES = 4
"""Every tensor of a model is kept for each of them."""
INFER = "infer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactCheck:
    """One artifact's figures, what is wrong with it, and its tensors where they were compared."""

    proof: Proof
    problems: tuple[str, ...]
    layers: LayerReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examiner:
    """What artifacts are compared with.

    Args:
        reference: the float model's answers; its `spec` is the bundle's record of pre-processing.
        spec: the input that the model was trained on.
        float_path: the bundle's float32 file.
        traced: PyTorch's tensors of `images()`; None compares no tensors of the float32 file.
    """

    reference: Reference
    spec: InputSpec
    float_path: Path
    traced: Sequence[TracedTensor] | None = None

    def check(self, path: Path, precision: str, head: LinearHead) -> ArtifactCheck:
        """Compare one file; `head` is the one fitted to its features.

        Raises:
            ConversionError: the file cannot be read, or kills the process that interprets it.
        """
        proof = prove_infer(path, self.reference) if precision == INFER else prove_tflite(path, head, self.reference)
        layers = self._layers(path, precision, head)
        problems = [*proof.problems(precision), *self._record_problems(path)]
        if layers and layers.first_departed:
            problems.append(f"departs at {layers.first_departed.place} ({layers.first_departed.kind})")
        return ArtifactCheck(proof=proof, problems=tuple(problems), layers=layers)

    def check_coreml(self, path: Path, form: str, deployed: nn.Module | None) -> ArtifactCheck:
        """Compare a Core ML package; its tensors too where the trained model's inference form, with head, is given.

        Raises:
            ConversionError: the package cannot be read, or kills the process that interprets it.
        """
        proof, name = prove_coreml(path, self.reference), coreml_name(form)
        layers = None if deployed is None or self.traced is None else self._package_layers(path, form, deployed)
        problems = [*proof.problems(name)]
        if layers and layers.first_departed:
            problems.append(f"departs at {layers.first_departed.place} ({layers.first_departed.kind})")
        return ArtifactCheck(proof=proof, problems=tuple(problems), layers=layers)

    def _package_layers(self, path: Path, form: str, deployed: nn.Module) -> LayerReport:
        expected, spec = self.images(), self.spec
        with tempfile.TemporaryDirectory(prefix="fieldvit-layers-") as directory:
            shape = (1, spec.height, spec.width, spec.channels)
            reference = Path(directory) / "float32.mlpackage"
            coreml.convert(deployed, shape, reference, input_spec_metadata={}, labels=(), is_half=False)
            return compare_package(
                path,
                reference,
                self.traced or (),
                self.images(self.reference.spec),
                artifact=coreml_name(form),
                is_half=form == HALF,
                expected_images=expected,
            )

    def images(self, spec: InputSpec | None = None) -> np.ndarray:
        """The images whose tensors are compared, float32 [N, H, W, C], pre-processed as `spec` says, or as trained."""
        images = self.reference.images.images
        chosen = np.linspace(0, len(images) - 1, LAYER_IMAGES).astype(int)
        return np.concatenate([to_input([images[int(index)]], spec or self.spec) for index in chosen])

    def _layers(self, path: Path, precision: str, head: LinearHead) -> LayerReport | None:
        seen = self.images(self._spec_of(path))
        if precision != FLOAT:
            return compare_quantized(
                path, self.float_path, seen, artifact=precision, expected_images=self.images(), head=head.logits
            )
        return compare_float(path, self.traced, seen, artifact=precision) if self.traced else None

    def _spec_of(self, path: Path) -> InputSpec:
        """The record by which the artifact is fed: the bundle's, or the file's own where only that one is wrong."""
        table = flatbuffer.read_metadata(path)
        if self.reference.spec != self.spec or table is None or table == to_table(self.spec):
            return self.reference.spec
        return _to_spec(path, table)

    def _record_problems(self, path: Path) -> list[str]:
        table, found = flatbuffer.read_metadata(path), []
        if self.reference.spec != self.spec:
            found.append(
                f"the bundle pre-processes otherwise than training did: {_changes(self.reference.spec, self.spec)}"
            )
        if table is not None and table != to_table(self.spec):
            found.append(
                f"its metadata pre-process otherwise than training did: {_changes(_to_spec(path, table), self.spec)}"
            )
        return found


def _to_spec(path: Path, table: Mapping[str, Any]) -> InputSpec:
    return from_table(InputSpec, table, where=f"{path.name}: metadata of the input", error=ArtifactError)


def _changes(spec: InputSpec, expected: InputSpec) -> str:
    ours, theirs = to_table(spec), to_table(expected)
    return ", ".join(f"{name} {ours[name]} in place of {theirs[name]}" for name in ours if ours[name] != theirs[name])
