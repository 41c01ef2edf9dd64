"""The model that is served, its probation after an update, and the way back.

During a probation the model before stays in memory, so that going back costs nothing. The frame loop reads one reference;
the update thread replaces it.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from device.classifier import HEAD_NAME, Answer, Classifier, read_base_head
from device.contract.board import Runtime
from device.contract.bundle import verify_directory
from device.contract.errors import ArtifactError, DeviceError, EngineError, UpdateRefusedError
from device.contract.manifest import Artifact, Manifest
from device.engine import Engine
from device.golden import check_golden
from device.journal import Entry
from device.learned import LearnedStore
from device.preprocess import preprocess
from device.ring import FeatureRing
from device.slots import Slots
from device.telemetry import Window

LOAD_ATTEMPTS = 3
LOAD_PAUSE_S = 0.3

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
            EngineError: LiteRT refuses the model, or the system has no room for it now.
        """
        directory = slots.directory(slot)
        try:
            manifest = verify_directory(directory)
        except OSError as error:
            kind = ArtifactError if error.errno == errno.EIO else EngineError
            raise kind(f"{directory}: cannot be read ({error}); install the bundle again") from error
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


@dataclass(slots=True, kw_only=True)
class _Probation:
    """What a model did since it serves on probation. Only the frame loop counts, so counting needs no lock."""

    model: Model
    since: float
    good_frames: int = 0
    bad_frames: int = 0
    problem: str = ""


class Serving:
    """Which model serves, and whether it is on probation.

    The updates thread may replace the model at any moment. What the frame loop says about a model therefore names it, and
    counts only while that very model is on probation.
    """

    def __init__(self, slots: Slots, runtime: Runtime, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._runtime, self._clock = slots, runtime, clock
        self._lock = threading.RLock()
        self._previous: Model | None = None
        self._probation: _Probation | None = None
        self.model: Model | None = None

    @property
    def is_testing(self) -> bool:
        return self._probation is not None

    def start(self) -> None:
        """Load what the journal says, if nothing is served; a model that cannot be loaded gives way to the one before.

        The last model is kept when its files are whole: what stops LiteRT now, for example too little memory, may pass,
        and `start` can be called again.
        """
        with self._lock:
            while self.model is None and (entry := self._slots.serving()):
                try:
                    self._serve(self._load(entry))
                except DeviceError as error:
                    log.error("slot %s cannot be loaded: %s", entry.slot, error)
                    if isinstance(error, EngineError) and not self._slots.has_other(entry.slot):
                        return
                    self._slots.reject(entry.slot, "load", str(error))

    def activate(self, slot: str, precision: str) -> None:
        """Serve a staged slot on probation; a model that cannot be loaded here either is rejected.

        Raises:
            ArtifactError, EngineError: it cannot be loaded.
            UpdateRefusedError: the journal cannot be written.
        """
        try:
            model = Model.load(self._slots, slot, precision, self._runtime)
        except DeviceError as error:
            self._slots.reject(slot, "load", str(error))
            raise
        with self._lock, _refusing_disk():
            self._slots.begin_testing(slot, precision)
            self._previous = self.model
            self._serve(model)

    def count_good_frame(self, model: Model) -> None:
        probation = self._probation
        if probation and probation.model is model:
            probation.good_frames += 1

    def count_bad_frame(self, model: Model, problem: str) -> None:
        """Count a frame that does not fit the model's input; whose fault that is, the other frames tell."""
        probation = self._probation
        if probation and probation.model is model:
            probation.bad_frames += 1
            probation.problem = problem

    def is_soaked(self) -> bool:
        """Whether the probation is over: enough good frames, or enough time."""
        return self._has_soaked(self._probation)

    def end_probation(self) -> None:
        """Confirm a model that has soaked; go back if frames came and not one of them was good."""
        probation = self._probation
        if not self._has_soaked(probation):
            return
        with self._lock:
            if probation is None or self._probation is not probation:
                return
            if probation.bad_frames and not probation.good_frames:
                detail = f"not one of {probation.bad_frames} frames could be used: {probation.problem}"
                self.revert(probation.model, "frames", detail)
            else:
                self.confirm()

    def confirm(self) -> None:
        """Confirm the model on probation when its golden outputs are right once more, else go back."""
        with self._lock:
            if self._probation is None:
                return
            model = self._probation.model
            try:
                model.check_golden()
            except DeviceError as error:
                self.revert(model, "golden", str(error))
                return
            self._slots.confirm(model.slot)
            self._previous = self._probation = None
            log.info("slot %s confirmed: %s %s", model.slot, model.manifest.name, model.manifest.version)

    def revert(self, model: Model, reason: str, detail: str) -> None:
        """Reject a model and serve the one before, if that model is still on probation."""
        with self._lock:
            if self._probation is None or self._probation.model is not model:
                return
            log.error("slot %s rejected (%s): %s", model.slot, reason, detail)
            self._slots.reject(model.slot, reason, detail)
            previous, self._previous = self._previous, None
            if previous is not None:
                self._serve(previous)
            else:
                self.model = self._probation = None
                self.start()

    def rollback(self) -> Model:
        """Go back to the model before, for good; ArtifactError when there is none that can be loaded."""
        with self._lock:
            if self.model is None:
                raise ArtifactError("there is no model to go back from; install one with 'fieldvit-device update'")
            model = self._load(self._slots.rollback_target())
            with _refusing_disk():
                self._slots.reject(self.model.slot, "rolled-back", "by the operator")
            self._previous = None
            self._serve(model)
            return model

    def _has_soaked(self, probation: _Probation | None) -> bool:
        return probation is not None and (
            probation.good_frames >= self._runtime.soak_frames
            or self._clock() - probation.since >= self._runtime.soak_s
        )

    def _load(self, entry: Entry) -> Model:
        """Load a model that has run here before, so what LiteRT has against it now may pass in a moment."""
        for _ in range(LOAD_ATTEMPTS - 1):
            try:
                return Model.load(self._slots, entry.slot, entry.precision, self._runtime)
            except EngineError as error:
                log.warning("slot %s cannot be loaded, trying again: %s", entry.slot, error)
                time.sleep(LOAD_PAUSE_S)
        return Model.load(self._slots, entry.slot, entry.precision, self._runtime)

    def _serve(self, model: Model) -> None:
        is_testing = self._slots.state(model.slot).state == "testing"
        self._probation = _Probation(model=model, since=self._clock()) if is_testing else None
        self.model = model


@contextmanager
def _refusing_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UpdateRefusedError(
            "disk", f"the journal cannot be written ({error}); make room, or check the disk"
        ) from error
