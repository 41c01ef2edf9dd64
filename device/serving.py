"""The model that is served, its probation after an update, and the way back.

During a probation the model before stays in memory, so that going back costs nothing. The frame loop reads one reference;
the update thread replaces it.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from device.classifier import HEAD_NAME, Answer, Classifier, read_base_head
from device.contract.board import Runtime
from device.contract.bundle import verify_directory
from device.contract.errors import ArtifactError, DeviceError, EngineError
from device.contract.manifest import Artifact, Manifest
from device.engine import Engine
from device.golden import check_golden
from device.journal import Entry
from device.learned import LearnedStore
from device.preprocess import preprocess
from device.ring import FeatureRing
from device.slots import Slots
from device.telemetry import Window

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded artifact with everything that belongs to its features."""

    slot: str
    directory: Path
    manifest: Manifest
    artifact: Artifact
    engine: Engine
    classifier: Classifier
    ring: FeatureRing
    window: Window

    @classmethod
    def load(cls, slots: Slots, slot: str, precision: str, runtime: Runtime) -> Self:
        """Verify a slot's files against its manifest and load one artifact.

        Raises:
            ArtifactError: files are missing or damaged, or there is no such artifact.
            EngineError: LiteRT refuses the model.
        """
        directory = slots.directory(slot)
        manifest = verify_directory(directory)
        artifact = manifest.artifact(precision)
        base = read_base_head(directory, manifest, artifact)
        store = LearnedStore(slots.root / "state", artifact.backbone, manifest.files[HEAD_NAME].sha256)
        return cls(
            slot=slot,
            directory=directory,
            manifest=manifest,
            artifact=artifact,
            engine=Engine(directory / artifact.path, num_threads=runtime.threads),
            classifier=Classifier(base, manifest, store),
            ring=FeatureRing(runtime.feature_ring, manifest.learning.feature_dim),
            window=Window(base.feature_mean, base.feature_std),
        )

    def infer(self, pixels: np.ndarray) -> tuple[np.ndarray, Answer]:
        """Features [D] and answer of one frame, uint8 [h, w, C].

        Raises:
            FrameError: the frame has the wrong number of channels.
            EngineError: LiteRT failed, or the features are not finite.
        """
        features = self.engine.features(preprocess(pixels[None], self.manifest.input))
        if not np.isfinite(features).all():
            raise EngineError(f"{self.artifact.path}: features are not finite")
        return features, self.classifier.classify(features)

    def check_golden(self) -> None:
        """Compare the golden outputs in this process; ArtifactError when they differ."""
        check_golden(self.engine, self.directory, self.manifest.input, self.artifact, self.classifier.base.learner)


class Serving:
    """Which model serves, and whether it is on probation."""

    def __init__(self, slots: Slots, runtime: Runtime, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._runtime, self._clock = slots, runtime, clock
        self._lock = threading.RLock()
        self._previous: Model | None = None
        self._good_frames = 0
        self._since = 0.0
        self.model: Model | None = None
        self.is_testing = False

    def start(self) -> None:
        """Load what the journal says; a model that cannot be loaded is rejected, and the one before takes over."""
        with self._lock:
            self.model = None
            while self.model is None and (entry := self._slots.serving()):
                try:
                    self._serve(self._load(entry))
                except DeviceError as error:
                    log.error("slot %s cannot be loaded: %s", entry.slot, error)
                    self._slots.reject(entry.slot, "load", str(error))

    def activate(self, slot: str, precision: str) -> None:
        """Serve a staged slot on probation; a model that cannot be loaded here either is rejected.

        Raises:
            ArtifactError, EngineError: it cannot be loaded.
        """
        try:
            model = Model.load(self._slots, slot, precision, self._runtime)
        except DeviceError as error:
            self._slots.reject(slot, "load", str(error))
            raise
        with self._lock:
            self._slots.begin_testing(slot, precision)
            self._previous = self.model
            self._serve(model)

    def count_good_frame(self) -> None:
        self._good_frames += 1

    def is_soaked(self) -> bool:
        """Whether the probation is over: enough frames or enough time without an error."""
        return self._good_frames >= self._runtime.soak_frames or self._clock() - self._since >= self._runtime.soak_s

    def confirm(self) -> None:
        """End the probation: confirm when the golden outputs are right once more, else go back."""
        with self._lock:
            if self.model is None or not self.is_testing:
                return
            try:
                self.model.check_golden()
            except DeviceError as error:
                self.revert("golden", str(error))
                return
            self._slots.confirm(self.model.slot)
            self._previous, self.is_testing = None, False
            log.info("slot %s confirmed: %s %s", self.model.slot, self.model.manifest.name, self.model.manifest.version)

    def revert(self, reason: str, detail: str) -> None:
        """Reject the model on probation and serve the one before."""
        with self._lock:
            if self.model is None:
                return
            log.error("slot %s rejected (%s): %s", self.model.slot, reason, detail)
            self._slots.reject(self.model.slot, reason, detail)
            previous, self._previous = self._previous, None
            if previous is not None:
                self._serve(previous)
            else:
                self.start()

    def rollback(self) -> Model:
        """Go back to the model before, for good; ArtifactError when there is none that can be loaded."""
        with self._lock:
            if self.model is None:
                raise ArtifactError("there is no model to go back from; install one with 'fieldvit-device update'")
            model = self._load(self._slots.rollback_target())
            self._slots.reject(self.model.slot, "rolled-back", "by the operator")
            self._previous = None
            self._serve(model)
            return model

    def _load(self, entry: Entry) -> Model:
        return Model.load(self._slots, entry.slot, entry.precision, self._runtime)

    def _serve(self, model: Model) -> None:
        self.model = model
        self.is_testing = self._slots.state(model.slot).state == "testing"
        self._good_frames = 0
        self._since = self._clock()
