"""From an update source to a proven model in the spare slot. What is served is not touched here.

Reasons of a refusal, beside those of `device.tuf_client`:

    rejected-before  this very bundle failed or was rolled back here (`--force` tries again, without trusting it more)
    busy             another model is still in testing
    damaged          the bundle's files and its manifest disagree
    disk             it cannot be written
    board            built for other boards, or without an artifact that this board can run
    budget           too large, too slow or too hungry for the board profile
    selftest         golden outputs differ, or the model crashed or hung in its child process
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device.config import AgentConfig, resolve_runtime
from device.contract.board import Board
from device.contract.bundle import extract, read_manifest
from device.contract.errors import AgentBusyError, ArtifactError, BoardMismatchError, UpdateRefusedError
from device.contract.manifest import Artifact, Manifest
from device.journal import Entry
from device.selftest import SelfTest, run_in_child
from device.slots import Slots

log = logging.getLogger(__name__)

RunSelfTest = Callable[[Path, str], SelfTest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A bundle that lies proven in a slot, and which of its artifacts to serve."""

    slot: str
    manifest: Manifest
    test: SelfTest


class Updater:
    """Checks the source and stages what it offers."""

    def __init__(
        self, root: Path, config: AgentConfig, board: Board, slots: Slots, *, run_selftest: RunSelfTest | None = None
    ) -> None:
        self._root, self._config, self._board, self._slots = root, config, board, slots
        threads = resolve_runtime(board, config.runtime).threads
        self._run_selftest = run_selftest or (lambda slot, precision: run_in_child(slot, precision, threads=threads))

    def stage(self, source: Path, *, force: bool = False) -> Staged | None:
        """Bring the channel's bundle into the spare slot and prove it there; None when it is served already.

        Raises:
            UpdateRefusedError: with a stable reason.
            ConfigError: no trusted root.
        """
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
        log.info("downloading %s, %d bytes", offer.bundle, offer.bytes)
        bundle = update_source.download(offer)
        try:
            entry = self._extract(bundle, offer.sha256)
        finally:
            bundle.unlink()
        return self._prove(entry, offer.release)

    def _extract(self, bundle: Path, sha256: str) -> Entry:
        try:
            self._require_board(read_manifest(bundle))
            return self._slots.stage(sha256, lambda directory: extract(bundle, directory))
        except AgentBusyError as error:
            raise UpdateRefusedError("busy", str(error)) from error
        except BoardMismatchError as error:
            raise UpdateRefusedError("board", str(error)) from error
        except ArtifactError as error:
            raise UpdateRefusedError("damaged", f"{bundle.name}: {error}") from error
        except OSError as error:
            raise UpdateRefusedError(
                "disk", f"{bundle.name}: cannot be unpacked ({error}); make room on the disk"
            ) from error

    def _prove(self, entry: Entry, release: int) -> Staged:
        slot = self._slots.directory(entry.slot)
        manifest = read_manifest(slot)
        try:
            if manifest.release != release:
                raise UpdateRefusedError(
                    "damaged", f"{manifest.name}: manifest says release {manifest.release}, the channel {release}"
                )
            test = self._first_that_passes(slot, candidates(manifest, self._board, self._config.precision))
        except UpdateRefusedError as error:
            self._slots.reject(entry.slot, error.reason, str(error))
            raise
        log.info(
            "%s %s %s passed its self-test in slot %s", manifest.name, manifest.version, test.precision, entry.slot
        )
        return Staged(slot=entry.slot, manifest=manifest, test=test)

    def _first_that_passes(self, slot: Path, artifacts: list[Artifact]) -> SelfTest:
        refusals = []
        for artifact in artifacts:
            try:
                return self._try(slot, artifact)
            except UpdateRefusedError as error:
                log.warning("candidate refused: %s", error)
                refusals.append(error)
        raise UpdateRefusedError(refusals[-1].reason, "; ".join(str(error) for error in refusals))

    def _try(self, slot: Path, artifact: Artifact) -> SelfTest:
        budget, size = self._board.budget, (slot / artifact.path).stat().st_size
        if size > budget.artifact_bytes:
            raise UpdateRefusedError(
                "budget", f"{artifact.precision}: {size} bytes, {budget.artifact_bytes} are allowed"
            )
        try:
            test = self._run_selftest(slot, artifact.precision)
        except ArtifactError as error:
            raise UpdateRefusedError("selftest", str(error)) from error
        if test.latency_p50_ms > budget.latency_ms:
            raise UpdateRefusedError(
                "budget", f"{artifact.precision}: {test.latency_p50_ms:.1f} ms, {budget.latency_ms:.1f} are allowed"
            )
        if test.peak_memory_mb > budget.peak_memory_mb:
            raise UpdateRefusedError(
                "budget", f"{artifact.precision}: {test.peak_memory_mb:.0f} MB, {budget.peak_memory_mb} are allowed"
            )
        return test

    def _require_board(self, manifest: Manifest) -> None:
        if self._board.name not in manifest.boards:
            raise BoardMismatchError(
                f"{manifest.name} {manifest.version} was built for {', '.join(manifest.boards)}, not for {self._board.name}"
            )
        candidates(manifest, self._board, self._config.precision)


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
