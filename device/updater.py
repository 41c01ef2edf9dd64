"""From an update source to a proven model in the spare slot. What is served is not touched here.

Reasons of a refusal, beside those of `device.tuf_client`:

    rejected-before  this very bundle failed or was rolled back here (`--force` tries again, without trusting it more)
    busy             another model is still in testing
    damaged          the bundle's files and its manifest disagree
    disk             it does not fit on the disk, or the disk fails
    board            built for other boards, or without an artifact that this board can run
    budget           too large, too slow or too hungry for the board profile
    selftest         golden outputs differ, or the model crashed or hung in its child process
    interrupted      the agent stopped before the model was proven; nothing is held against it
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device.config import AgentConfig, resolve_runtime
from device.contract.board import Board
from device.contract.bundle import extract, read_manifest
from device.contract.errors import (
    AgentBusyError,
    ArtifactError,
    BoardMismatchError,
    InterruptedTestError,
    NoVerdictError,
    UpdateRefusedError,
)
from device.contract.manifest import Artifact, Manifest
from device.journal import Entry
from device.selftest import SelfTest, run_in_child
from device.slots import Slots

log = logging.getLogger(__name__)

RunSelfTest = Callable[[Path, str], SelfTest]

BUNDLE_PER_ARTIFACT = 4
BUNDLE_EXTRA_BYTES = 64 << 20
"""A bundle may have so many times the board's `artifact_bytes`, and so much beside: it is read into memory to be checked."""

SAME_SPEED, SAME_SPEED_MS = 1.05, 0.1
"""Latencies closer than this, as a ratio or in milliseconds, do not decide: the board profile's order does."""


class _PerhapsBusyError(UpdateRefusedError):
    """What a busy board may have caused: worth a second test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A bundle that lies proven in a slot, and which of its artifacts to serve."""

    slot: str
    manifest: Manifest
    test: SelfTest


class Updater:
    """Checks the source and stages what it offers; `stop` ends a self-test that is under way."""

    def __init__(
        self,
        root: Path,
        config: AgentConfig,
        board: Board,
        slots: Slots,
        *,
        run_selftest: RunSelfTest | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._root, self._config, self._board, self._slots = root, config, board, slots
        threads = resolve_runtime(board, config.runtime).threads
        self._run_selftest = run_selftest or (
            lambda slot, precision: run_in_child(slot, precision, threads=threads, stop=stop)
        )
        self._unfit = ("", "", "")  # the last bundle that its manifest ruled out, why: not copied again at each check

    def stage(self, source: Path, *, force: bool = False) -> Staged | None:
        """Bring the channel's bundle into the spare slot and prove it there; None when it is served already.

        Raises:
            UpdateRefusedError: with a stable reason.
            ConfigError: no trusted root.
        """
        try:
            return self._stage(source, force=force)
        except OSError as error:
            raise UpdateRefusedError(
                "disk", f"{self._root}: cannot be written ({error}); make room, or check the disk"
            ) from error

    def _stage(self, source: Path, *, force: bool) -> Staged | None:
        from device.tuf_client import UpdateSource  # here: 0.1 s at every start of the agent otherwise

        update_source = UpdateSource(source, self._root)
        offer = update_source.offer(self._config.channel)
        serving = self._slots.serving()
        if serving and serving.bundle == offer.sha256:
            return None
        if serving and offer.release <= serving.release:
            raise UpdateRefusedError(
                "rollback",
                f"{offer.bundle}: release {offer.release} is not newer than {serving.name} {serving.version}, release {serving.release}",
            )
        rejection = self._slots.rejection(offer.sha256)
        if rejection and not force:
            raise UpdateRefusedError(
                "rejected-before",
                f"{offer.bundle}: was rejected here before ({rejection.reason}); publish a newer one, or use --force",
            )
        sha256, *refusal = self._unfit
        if sha256 == offer.sha256 and not force:
            raise UpdateRefusedError(*refusal)
        log.info("downloading %s, %d bytes", offer.bundle, offer.bytes)
        max_bytes = BUNDLE_PER_ARTIFACT * self._board.budget.artifact_bytes + BUNDLE_EXTRA_BYTES
        bundle = update_source.download(offer, max_bytes=max_bytes)
        try:
            entry = self._extract(bundle, offer.sha256)
        except UpdateRefusedError as error:
            if error.reason in ("board", "budget"):
                self._unfit = (offer.sha256, error.reason, str(error))
            raise
        finally:
            bundle.unlink()
        return self._prove(entry, offer.release)

    def _extract(self, bundle: Path, sha256: str) -> Entry:
        try:
            self._require_fit(read_manifest(bundle))
            return self._slots.stage(sha256, lambda directory: extract(bundle, directory))
        except AgentBusyError as error:
            raise UpdateRefusedError("busy", str(error)) from error
        except BoardMismatchError as error:
            raise UpdateRefusedError("board", str(error)) from error
        except ArtifactError as error:
            raise UpdateRefusedError("damaged", f"{bundle.name}: {error}") from error

    def _prove(self, entry: Entry, release: int) -> Staged:
        slot = self._slots.directory(entry.slot)
        manifest = read_manifest(slot)
        try:
            if manifest.release != release:
                raise UpdateRefusedError(
                    "damaged", f"{manifest.name}: manifest says release {manifest.release}, the channel {release}"
                )
            test = self._fastest_that_passes(slot, self._candidates(manifest))
        except UpdateRefusedError as error:
            self._slots.reject(entry.slot, error.reason, str(error))
            raise
        except InterruptedTestError as error:
            self._slots.discard(entry.slot, "interrupted")
            raise UpdateRefusedError(
                "interrupted", f"{manifest.name} {manifest.version}: {error}; it will be tested again"
            ) from error
        log.info(
            "%s %s %s passed its self-test in slot %s", manifest.name, manifest.version, test.precision, entry.slot
        )
        return Staged(slot=entry.slot, manifest=manifest, test=test)

    def _fastest_that_passes(self, slot: Path, artifacts: list[Artifact]) -> SelfTest:
        passed, refusals = [], []
        for artifact in artifacts:
            try:
                passed.append(self._try(slot, artifact))
            except UpdateRefusedError as error:
                log.warning("candidate refused: %s", error)
                refusals.append(error)
        if not passed:
            raise UpdateRefusedError(refusals[-1].reason, "; ".join(str(error) for error in refusals))
        return fastest(passed)

    def _try(self, slot: Path, artifact: Artifact) -> SelfTest:
        self._require_size(artifact, (slot / artifact.path).stat().st_size)
        try:
            return self._test(slot, artifact)
        except _PerhapsBusyError as error:
            log.warning("testing once more, the board may have been busy: %s", error)
        return self._test(slot, artifact)

    def _test(self, slot: Path, artifact: Artifact) -> SelfTest:
        budget = self._board.budget
        try:
            test = self._run_selftest(slot, artifact.precision)
        except NoVerdictError as error:
            raise _PerhapsBusyError("selftest", str(error)) from error
        except ArtifactError as error:
            raise UpdateRefusedError("selftest", str(error)) from error
        if test.peak_memory_mb > budget.peak_memory_mb:
            raise UpdateRefusedError(
                "budget", f"{artifact.precision}: {test.peak_memory_mb:.0f} MB, {budget.peak_memory_mb} are allowed"
            )
        if test.latency_p50_ms > budget.latency_ms:
            raise _PerhapsBusyError(
                "budget", f"{artifact.precision}: {test.latency_p50_ms:.1f} ms, {budget.latency_ms:.1f} are allowed"
            )
        return test

    def _require_fit(self, manifest: Manifest) -> None:
        """Refuse what the manifest alone rules out, before a slot is emptied for it."""
        if self._board.name not in manifest.boards:
            raise BoardMismatchError(
                f"{manifest.name} {manifest.version} was built for {', '.join(manifest.boards)}, not for {self._board.name}"
            )
        sizes = {artifact: manifest.files[artifact.path].bytes for artifact in self._candidates(manifest)}
        smallest = min(sizes, key=sizes.__getitem__)
        self._require_size(smallest, sizes[smallest])

    def _require_size(self, artifact: Artifact, size: int) -> None:
        if size > self._board.budget.artifact_bytes:
            raise UpdateRefusedError(
                "budget", f"{artifact.precision}: {size} bytes, {self._board.budget.artifact_bytes} are allowed"
            )

    def _candidates(self, manifest: Manifest) -> list[Artifact]:
        return candidates(manifest, self._board, self._config.precision)


def fastest(tests: list[SelfTest]) -> SelfTest:
    """The test with the lowest latency; of those that are as fast within the bounds above, the first."""
    best = min(test.latency_p50_ms for test in tests)
    limit = max(SAME_SPEED * best, best + SAME_SPEED_MS)
    return next(test for test in tests if test.latency_p50_ms <= limit)


def candidates(manifest: Manifest, board: Board, precision: str) -> list[Artifact]:
    """The artifacts this board may run, in the order of its profile; `precision` pins one.

    Raises:
        BoardMismatchError: there is none.
    """
    wanted = (precision,) if precision else board.support.precisions
    by_precision = {artifact.precision: artifact for artifact in manifest.artifacts}
    chosen = [by_precision[name] for name in wanted if name in by_precision]
    if not chosen:
        raise BoardMismatchError(
            f"{manifest.name} {manifest.version} holds {', '.join(by_precision)}; {board.name} is set to run {', '.join(wanted)}"
        )
    return chosen
