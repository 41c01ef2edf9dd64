"""Golden frames, run again and again on the very interpreter that serves: it must go on computing what the host did.

A self-test proves the file once, in another process. What happens later (memory that flips a bit, a processor that is too
hot, a delegate that goes wrong after hours) shows only in the process that serves. One golden frame is a frame's time, so
they are checked one by one between frames: all of them during the soak, then one from time to time.
"""

from pathlib import Path

import numpy as np

from device.backbone import Backbone
from device.contract.errors import ArtifactError
from device.contract.manifest import Artifact, InputSpec
from device.golden import GOLDEN_NAME, read_arrays
from device.learning.slda import SLDA
from device.preprocess import preprocess


class Canary:
    """The golden frames of one served model, kept in memory: a few kilobytes."""

    def __init__(self, engine: Backbone, slot: Path, spec: InputSpec, artifact: Artifact, base_head: SLDA) -> None:
        """Read them.

        Args:
            engine: the one that serves.
            slot: directory of the extracted bundle.
            spec: of the model's input.
            artifact: which one is served.
            base_head: the head that the bundle ships, not what was learned since.

        Raises:
            ArtifactError: they are damaged or missing.
        """
        self._engine, self._spec, self._artifact, self._base_head = engine, spec, artifact, base_head
        arrays = read_arrays(slot / GOLDEN_NAME)
        try:
            self._frames = arrays["frames"]  # uint8 [n, h, w, C]
            self._features = arrays[f"{artifact.precision}/features"]  # [n, D]
            self._answers = arrays[f"{artifact.precision}/logits"].argmax(axis=1)  # [n]
        except KeyError as error:
            raise ArtifactError(f"{slot / GOLDEN_NAME}: has no {error}; export the bundle again") from error
        self._scale = max(float(np.abs(self._features).max()), 1e-12)
        self._next = 0

    def __len__(self) -> int:
        return len(self._frames)

    def check_next(self) -> None:
        """Run one frame.

        Raises:
            ArtifactError: it gives other features, or another answer of the head that was shipped, than on the host.
            EngineError: LiteRT failed.
        """
        index, self._next = self._next, (self._next + 1) % len(self._frames)
        features = self._engine.features(preprocess(self._frames[index : index + 1], self._spec))
        difference = float(np.abs(features - self._features[index]).max() / self._scale)
        where = f"{self._artifact.path}: golden frame {index}"
        if not difference <= self._artifact.golden_tolerance:  # not `>`: NaN must not pass
            raise ArtifactError(
                f"{where} differs by {difference:.2g} of the largest value while it serves, "
                f"{self._artifact.golden_tolerance:.2g} is allowed; this board no longer computes what the host did"
            )
        if self._base_head.logits(features[None]).argmax() != self._answers[index]:
            raise ArtifactError(f"{where} gets another answer than on the host while it serves")
