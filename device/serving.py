"""The model that is served, its probation after an update, and the way back.

During a probation the model before stays in memory, so that going back costs nothing. The frame loop reads one reference;
the update thread replaces it.

A model on probation gives way for an error of the interpreter, a golden frame that it computes otherwise, a budget it is
over, or no usable frame. A confirmed one is watched by golden frames alone, and gives way only to one that passes them.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from device.backbone import Backbone, open_backbone
from device.canary import Canary
from device.classifier import Answer, Classifier, read_base_head
from device.contract.board import Budget, Runtime
from device.contract.bundle import verify_directory
from device.contract.errors import (
    ArtifactError,
    DeviceError,
    EngineError,
    FrameError,
    LearningError,
    UpdateRefusedError,
)
from device.contract.manifest import Artifact, Manifest
from device.contract.record import record
from device.frames import Frame
from device.golden import check_golden
from device.journal import Entry
from device.learned import HEAD_NAME, LearnedStore
from device.memory import give_back
from device.migration import Fate, Migration, forecast, hold, is_same_state, loss_refusal, migrate
from device.preprocess import preprocess
from device.probation import Probation
from device.ring import FeatureRing
from device.slots import Slots
from device.telemetry import Window, memory_bytes

CANARY_S = 60.0
"""How often one golden frame is run on a confirmed model."""
CACHES = "cache"
LOAD_ATTEMPTS = 3
LOAD_PAUSE_S = 0.3

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded artifact with everything that belongs to its features."""

    slot: str
    directory: Path
    manifest: Manifest
    artifact: Artifact
    engine: Backbone
    classifier: Classifier
    ring: FeatureRing
    window: Window
    input: np.ndarray  # float32 [1, H, W, C]: the memory that each frame is pre-processed in

    @classmethod
    def load(
        cls,
        slots: Slots,
        slot: str,
        precision: str,
        runtime: Runtime,
        *,
        verify: Callable[[Path], Manifest] = verify_directory,
    ) -> Self:
        """Verify a slot's files against its manifest and load one artifact.

        Raises:
            ArtifactError: files are missing or damaged, or there is no such artifact.
            EngineError: LiteRT refuses the model, or the system has no room for it now.
        """
        directory = slots.directory(slot)
        try:
            manifest = verify(directory)
        except OSError as error:
            kind = ArtifactError if error.errno == errno.EIO else EngineError
            raise kind(f"{directory}: cannot be read ({error}); install the bundle again") from error
        artifact = manifest.artifact(precision)
        store = LearnedStore(slots.root / "state", artifact.backbone, manifest.files[HEAD_NAME].sha256)
        base, spec = read_base_head(directory, manifest, artifact), manifest.input
        return cls(
            slot=slot,
            directory=directory,
            manifest=manifest,
            artifact=artifact,
            engine=open_backbone(
                directory,
                manifest,
                artifact,
                threads=runtime.threads,
                delegate=runtime.delegate,
                caches=slots.root / CACHES if runtime.weight_cache else None,
            ),
            classifier=Classifier(base, manifest, store),
            ring=FeatureRing(runtime.feature_ring, manifest.learning.feature_dim),
            window=Window(base.feature_mean, base.feature_std),
            input=np.empty((1, spec.height, spec.width, spec.channels), np.float32),
        )

    def infer(self, pixels: np.ndarray) -> tuple[np.ndarray, Answer]:
        """Features [D] and answer of one frame, uint8 [h, w, C]; called by one thread only.

        Raises:
            FrameError: the frame has the wrong number of channels.
            EngineError: LiteRT failed, or the features are not finite.
        """
        features = self.engine.features(preprocess(pixels[None], self.manifest.input, out=self.input))
        if not np.isfinite(features).all():
            raise EngineError(f"{self.artifact.path}: features are not finite")
        return features, self.classifier.classify(features)

    def check_golden(self) -> None:
        """Compare the golden outputs in this process; ArtifactError when they differ."""
        check_golden(self.engine, self.directory, self.manifest.input, self.artifact, self.classifier.base.learner)


@record(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What became of one frame: an answer, or the error in place of one."""

    model: Model
    frame: Frame
    outcome: tuple[np.ndarray, Answer] | FrameError | EngineError  # features [D] and answer
    latency_s: float


def attempt(model: Model, frame: Frame) -> Attempt:
    """Classify one frame; called by one thread only."""
    started = time.perf_counter()
    outcome: tuple[np.ndarray, Answer] | FrameError | EngineError
    try:
        outcome = model.infer(frame.pixels)
    except (FrameError, EngineError) as error:
        outcome = error
    return Attempt(model=model, frame=frame, outcome=outcome, latency_s=time.perf_counter() - started)


@record(frozen=True, slots=True, kw_only=True)
class _Served:
    """A model in service: replaced as a whole, by one assignment."""

    model: Model
    canary: Canary
    probation: Probation | None


class Serving:
    """Which model serves, and whether it is on probation.

    The updates thread may replace the model at any moment. What the frame loop says about a model therefore names it, and
    counts only while that very model is on probation.
    """

    def __init__(
        self,
        slots: Slots,
        runtime: Runtime,
        *,
        budget: Budget | None = None,
        verify: Callable[[Path], Manifest] = verify_directory,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], int] = memory_bytes,
    ) -> None:
        """Serve from these slots.

        Args:
            slots: where the models are.
            runtime: threads, soak and canary intervals.
            budget: latency and memory that a model on probation must keep to; None: the self-test's verdict is enough.
            verify: reads the manifest of a slot that has served before, and checks its files.
            clock: seconds that never jump.
            memory: this process's resident bytes.
        """
        self._slots, self._runtime, self._budget, self._clock, self._memory = slots, runtime, budget, clock, memory
        self._verify = verify
        self._lock = threading.RLock()
        self._previous: _Served | None = None
        self._served: _Served | None = None
        self._problem = ""

    @property
    def model(self) -> Model | None:
        served = self._served
        return served.model if served else None

    @property
    def is_testing(self) -> bool:
        return self._probation is not None

    @property
    def problem(self) -> str:
        """What is wrong with the served model though it is kept, because there is no better one; "" when it is well."""
        return self._problem

    @property
    def _probation(self) -> Probation | None:
        served = self._served
        return served.probation if served else None

    def start(self) -> None:
        """Load what the journal says, if nothing is served; a model that cannot be loaded gives way to the one before.

        The last model is kept when its files are whole: what stops LiteRT now, for example too little memory, may pass,
        and `start` can be called again.
        """
        with self._lock:
            while self.model is None and (entry := self._slots.serving()):
                probation = Probation(memory_before=self._memory()) if entry.state == "testing" else None
                try:
                    self._serve(self._prepare(self._load(entry), probation))
                except DeviceError as error:
                    log.error("slot %s cannot be loaded: %s", entry.slot, error)
                    if isinstance(error, EngineError) and not self._slots.has_other(entry.slot):
                        return
                    try:
                        self._slots.reject(entry.slot, "load", str(error))
                    except OSError as disk:
                        log.error("the journal cannot be written (%s); make room, or check the disk", disk)
                        self._serve_beside(entry)
                        return

    def _serve_beside(self, entry: Entry) -> None:
        """Serve the other confirmed model, if there is one, though the journal goes on naming this one."""
        if self._slots.has_other(entry.slot):
            try:
                self._serve(self._prepare(self._load(self._slots.rollback_target())))
            except DeviceError as error:
                log.error("the model before cannot be loaded either: %s", error)

    def activate(self, slot: str, precision: str, *, accept_loss: bool = False) -> Migration:
        """Serve a staged slot on probation, with what was taught here; a model that cannot be loaded either is rejected.

        What moves is on the disk before the journal says that the new model serves, and counts from that line on: a power
        cut leaves the old model with its state or the new one with its own. The old state stays where it is for as long as
        its slot does.

        Args:
            slot: a staged one.
            precision: which of its artifacts.
            accept_loss: serve it also where it would not know a class that was taught here.

        Raises:
            ArtifactError, EngineError: it cannot be loaded.
            UpdateRefusedError: the journal cannot be written, or a taught class would be lost; the slot is empty again.
        """
        before = self._memory()
        try:
            served = self._prepare(
                Model.load(self._slots, slot, precision, self._runtime), Probation(memory_before=before)
            )
        except DeviceError as error:
            self._slots.reject(slot, "load", str(error))
            raise
        while True:
            old = self.model
            with hold(old):  # before our lock, as a lesson that is under way takes them
                migration = self._migrate(old, served.model, accept_loss=accept_loss)
                with self._lock, _refusing_disk():
                    if self.model is not old:  # the frame loop has loaded it anew, or gone back
                        continue
                    self._slots.begin_testing(slot, precision)
                    self._previous = self._served
                    self._serve(served)
                return migration

    def forecast(self, manifest: Manifest, artifact: Artifact) -> Fate:
        """What would become of the classes taught here; see `device.migration`."""
        return forecast(self.model, manifest, artifact)

    @property
    def learned_version(self) -> tuple[str, int]:
        """Changes with the served model and whatever it learns."""
        model = self.model
        return (model.artifact.backbone, model.classifier.head.version) if model else ("", 0)

    def _migrate(self, old: Model | None, new: Model, *, accept_loss: bool) -> Migration:
        """Stage what moves to a new model that does not serve yet; UpdateRefusedError where a class would be lost."""
        try:
            is_new = old is not None and not is_same_state(old, new.manifest, new.artifact)
            new.classifier.reload(is_new=is_new)
            migration = migrate(old, new, new.directory)
            if migration.fate.dropped and not accept_loss:
                raise loss_refusal(new.manifest, migration.fate, migration.reasons)
            if migration.head:
                new.classifier.stage(migration.head)
            elif is_new:
                new.classifier.stage_nothing()
        except (UpdateRefusedError, LearningError) as error:
            self._slots.discard(new.slot, "learned-loss")
            if isinstance(error, UpdateRefusedError):
                raise
            raise UpdateRefusedError("disk", str(error)) from error
        return migration

    def count_good_frame(self, model: Model, *, latency_s: float = 0.0) -> None:
        served = self._served
        if served and served.model is model and served.probation:
            served.probation.count_good_frame(latency_s * 1000)

    def count_bad_frame(self, model: Model, problem: str) -> None:
        """Count a frame that does not fit the model's input; whose fault that is, the other frames tell."""
        served = self._served
        if served and served.model is model and served.probation:
            served.probation.count_bad_frame(problem)

    def is_soaked(self) -> bool:
        """Whether the probation is over: enough good frames, or enough time."""
        return self._has_soaked(self._probation)

    def watch(self) -> None:
        """Do what is due between two frames: a golden frame, the budgets, the end of a probation."""
        self._fly_canary()
        served = self._served
        if served is None or served.probation is None:
            return
        served.probation.look_at_memory(self._memory(), self._clock())
        is_over = self._has_soaked(served.probation)
        if breach := served.probation.breach(is_over=is_over):
            self.revert(served.model, "budget", breach)
        elif is_over:
            self.end_probation()

    def end_probation(self) -> None:
        """Confirm a model that has soaked; go back if frames came and not one of them was good."""
        served = self._served
        if served is None or served.probation is None or not self._has_soaked(served.probation):
            return
        with self._lock:
            if self._served is not served:
                return
            if served.probation.bad_frames and not served.probation.good_frames:
                count, problem = served.probation.bad_frames, served.probation.problem
                self.revert(served.model, "frames", f"not one of {count} frames could be used: {problem}")
            else:
                self.confirm()

    def confirm(self) -> None:
        """Confirm the model on probation when its golden outputs are right once more, else go back."""
        with self._lock:
            served = self._served
            if served is None or served.probation is None:
                return
            model = served.model
            try:
                model.check_golden()
            except DeviceError as error:
                self.revert(model, "golden", str(error))
                return
            self._slots.confirm(model.slot)
            self._previous, self._served = None, replace(served, probation=None)
            give_back()
            log.info("slot %s confirmed: %s %s", model.slot, model.manifest.name, model.manifest.version)

    def revert(self, model: Model, reason: str, detail: str) -> None:
        """Reject a model and serve the one before, if that model is still on probation."""
        with self._lock:
            if self._probation is None or self.model is not model:
                return
            log.error("slot %s rejected (%s): %s", model.slot, reason, detail)
            try:
                self._slots.reject(model.slot, reason, detail)
            except OSError as error:  # the next start tries it again; what is wrong must not serve until then
                log.error("the journal cannot be written (%s); make room, or check the disk", error)
                if self._previous is None:
                    raise
            previous, self._previous = self._previous, None
            if previous is not None:
                self._serve(replace(previous, probation=None))
            else:
                self._served = None
                self.start()

    def rollback(self) -> Model:
        """Go back to the model before, for good; ArtifactError when there is none that can be loaded."""
        with self._lock:
            if self.model is None:
                raise ArtifactError("there is no model to go back from; install one with 'fieldvit-device update'")
            served = self._prepare(self._load(self._slots.rollback_target()))
            with _refusing_disk():
                self._slots.reject(self.model.slot, "rolled-back", "by the operator")
            self._previous = None
            self._serve(served)
            return served.model

    def _has_soaked(self, probation: Probation | None) -> bool:
        return probation is not None and (
            probation.good_frames >= self._runtime.soak_frames
            or self._clock() - probation.since >= self._runtime.soak_s
        )

    def _load(self, entry: Entry) -> Model:
        """Load a model that has run here before, so what LiteRT has against it now may pass in a moment."""
        for _ in range(LOAD_ATTEMPTS - 1):
            try:
                return self._load_once(entry)
            except EngineError as error:
                log.warning("slot %s cannot be loaded, trying again: %s", entry.slot, error)
                time.sleep(LOAD_PAUSE_S)
        return self._load_once(entry)

    def _load_once(self, entry: Entry) -> Model:
        return Model.load(self._slots, entry.slot, entry.precision, self._runtime, verify=self._verify)

    def _prepare(self, model: Model, probation: Probation | None = None) -> _Served:
        base_head = model.classifier.base.learner
        canary = Canary(model.engine, model.directory, model.manifest.input, model.artifact, base_head)
        return _Served(model=model, canary=canary, probation=probation)

    def _serve(self, served: _Served) -> None:
        if served.probation:
            served.probation.begin(self._clock(), self._budget)
        before, model = self.model, served.model
        if before and before is not model and is_same_state(before, model.manifest, model.artifact):
            model.classifier.take_over(before.classifier)
        self._next_canary, self._problem = self._clock() + self._canary_interval_s(served), ""
        self._served = served

    def _canary_interval_s(self, served: _Served) -> float:
        """On probation, all golden frames in half of its time."""
        return min(self._runtime.soak_s / (2 * len(served.canary)), CANARY_S) if served.probation else CANARY_S

    def _fly_canary(self) -> None:
        served = self._served
        if served is None or self._clock() < self._next_canary:
            return
        self._next_canary = self._clock() + self._canary_interval_s(served)
        try:
            served.canary.check_next()
            self._problem = ""
        except DeviceError as error:
            if served.probation:
                self.revert(served.model, "canary", str(error))
            else:
                self._distrust(served, str(error))

    def _distrust(self, served: _Served, detail: str) -> None:
        """A confirmed model computes otherwise: load it anew, or else go to the one before, if that one is right."""
        with self._lock:
            if self._served is not served or served.probation:
                return
            log.error("slot %s: %s", served.model.slot, detail)
            states = [self._slots.state(served.model.slot)]
            states += [self._slots.rollback_target()] if self._slots.has_other(served.model.slot) else []
            for entry in states:
                with suppress(DeviceError):
                    better = self._prepare(Model.load(self._slots, entry.slot, entry.precision, self._runtime))
                    better.model.check_golden()
                    slot = served.model.slot
                    if entry.slot != slot and not self._slots.give_way(slot, entry.slot, "canary", detail):
                        continue
                    self._serve(better)
                    self._problem = f"{detail}; " + (
                        "it is right after it was loaded anew" if entry is states[0] else "the model before serves"
                    )
                    return
            self._problem = f"{detail}; kept, because no other model here is right"


@contextmanager
def _refusing_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UpdateRefusedError(
            "disk", f"the journal cannot be written ({error}); make room, or check the disk"
        ) from error
