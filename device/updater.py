"""From an update source to a proven model in the spare slot. What is served is not touched here.

Reasons of a refusal, beside those of `device.tuf_client`:

    rejected-before  this very bundle failed or was rolled back here (`--force` tries again, without trusting it more)
    busy             another model is still in testing
    damaged          the bundle's files and its manifest disagree
    schema           its manifest was written for a newer agent
    pointer          the channel names another bundle, or another release, than the one that is there
    window           the maintenance window closed during the transfer; it goes on in the next one
    disk             it does not fit on the disk, or the disk fails
    board            built for other boards, or without an artifact that this board can run
    budget           too large, too slow or too hungry for the board profile
    runtime          this board's runtime lacks an operation, or computes such an artifact wrongly; held against the bundle
                     until there is another runtime
    learned-loss     it would drop classes that were taught here, and nobody has accepted that (`device.migration`)
    selftest         golden outputs differ, or the model crashed or hung in its child process
    interrupted      the agent stopped before the model was proven; nothing is held against it
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from device.config import DROP, AgentConfig, resolve_runtime
from device.contract.board import Board
from device.contract.bundle import extract, read_manifest
from device.contract.errors import (
    AgentBusyError,
    ArtifactError,
    BoardMismatchError,
    InterruptedTestError,
    NoVerdictError,
    RuntimeMismatchError,
    SchemaError,
    UpdateRefusedError,
)
from device.contract.manifest import Artifact, Manifest
from device.contract.record import record
from device.fetch import Pace
from device.journal import Entry
from device.migration import Fate, loss_refusal
from device.runtime import runtime_name
from device.slots import NAMES, Slots
from device.trusted_time import TrustedTime
from device.window import Schedule

if TYPE_CHECKING:
    from device.selftest import SelfTest
    from device.tuf_client import Offer, UpdateSource

log = logging.getLogger(__name__)

RunSelfTest = Callable[[Path, str], "SelfTest"]
Report = Callable[..., None]
"""Tells the world of an event: its kind, and what belongs to it by keyword."""

BUNDLE_PER_ARTIFACT = 4
BUNDLE_EXTRA_BYTES = 64 << 20
"""A bundle may have so many times the board's `artifact_bytes`, and so much beside: it is read into memory to be checked."""

TEST_CACHES = "cache/test"
"""Apart from the caches of what serves: an update must not push those out."""
SAME_SPEED, SAME_SPEED_MS = 1.05, 0.1
"""Latencies closer than this, as a ratio or in milliseconds, do not decide: the board profile's order does."""


class _PerhapsBusyError(UpdateRefusedError):
    """What a busy board may have caused: worth a second test."""


class Learned(Protocol):
    """Knows what was taught here: `device.serving.Serving`."""

    @property
    def learned_version(self) -> tuple[str, int]: ...

    def forecast(self, manifest: Manifest, artifact: Artifact) -> Fate: ...


@record(frozen=True, slots=True, kw_only=True)
class _Unfit:
    """The last bundle that was ruled out without a verdict in the journal: it is not copied again at each check."""

    sha256: str
    refusal: UpdateRefusedError
    learned_version: tuple[str, int]


@record(frozen=True, slots=True, kw_only=True)
class Staged:
    """A bundle, by its SHA-256, that lies proven in a slot, and which of its artifacts to serve."""

    slot: str
    bundle: str
    manifest: Manifest
    test: "SelfTest"


@record(frozen=True, slots=True, kw_only=True)
class Preview:
    """What would be installed, and what would become of the classes taught here."""

    manifest: Manifest
    fate: Fate


class Updater:
    """Checks the source and stages what it offers.

    `stop` ends a transfer or a self-test that is under way; `alive` is called while a transfer, which may take long, goes on.
    """

    def __init__(
        self,
        root: Path,
        config: AgentConfig,
        board: Board,
        slots: Slots,
        *,
        learned: Learned | None = None,
        run_selftest: RunSelfTest | None = None,
        stop: threading.Event | None = None,
        report: Report = lambda kind, **data: None,
        alive: Callable[[], None] = lambda: None,
        time: TrustedTime | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self._stop, self._report, self._alive = stop or threading.Event(), report, alive
        self._time = time or TrustedTime(root / "clock.json")
        self._schedule = schedule or Schedule(
            config.update.open_window(), is_clock_wrong=lambda: self._time.is_clock_wrong
        )
        self._root, self._config, self._board, self._slots = root, config, board, slots
        self._run_selftest = run_selftest or self._run_in_child
        self._learned = learned
        self._unfit: _Unfit | None = None

    def stage(
        self,
        source: Path | str,
        *,
        channel: str | None = None,
        force: bool = False,
        is_asked: bool = True,
        accept_loss: bool = False,
    ) -> Staged | None:
        """Bring the channel's bundle into the spare slot and prove it there.

        Args:
            source: a repository's directory or URL.
            channel: of the source; None: the configured one.
            force: try a bundle again that was rejected here before.
            is_asked: somebody wants it now; else the maintenance window decides, unless there is no model at all.
            accept_loss: also where classes taught here would be dropped.

        Returns:
            None when it is served already, or when the window is closed.

        Raises:
            UpdateRefusedError: with a stable reason.
            ConfigError: no trusted root.
        """
        is_free = is_asked or self._slots.serving() is None
        if not is_free and not self._schedule.may_start():
            log.debug("no look for an update now: outside of update.window")
            return None
        try:
            return self._stage(
                source,
                channel or self._config.channel,
                force=force,
                is_free=is_free,
                accept_loss=self.accepts(accept_loss=accept_loss),
            )
        except OSError as error:
            raise UpdateRefusedError(
                "disk", f"{self._root}: cannot be written ({error}); make room, or check the disk"
            ) from error

    def preview(self, source: Path | str, *, channel: str | None = None, force: bool = False) -> Preview | None:
        """What the channel offers, and what would become of the classes taught here; None when it is served already.

        The bundle is fetched and stays in ROOT/downloads for the install. Its artifacts are not tested, and what the guard
        says of a migration is not known yet.

        Raises:
            UpdateRefusedError: it would be refused anyway.
        """
        found = self._fetch(source, channel or self._config.channel, force=force, is_free=True, accept_loss=True)
        if found is None:
            return None
        offer, bundle = found
        with _refusing(bundle):
            manifest = read_manifest(bundle)
            _require_offered(manifest, offer)
            self._require_fit(manifest)
            artifact = self._candidates(manifest)[0]
        return Preview(manifest=manifest, fate=self._fate(manifest, artifact))

    def rule_out(self, bundle: str, refusal: UpdateRefusedError) -> None:
        """Do not fetch a bundle (its SHA-256) again by ourselves until something else was learned here."""
        version = self._learned.learned_version if self._learned else ("", 0)
        self._unfit = _Unfit(sha256=bundle, refusal=refusal, learned_version=version)

    def _stage(
        self, source: Path | str, channel: str, *, force: bool, is_free: bool, accept_loss: bool
    ) -> Staged | None:
        found = self._fetch(source, channel, force=force, is_free=is_free, accept_loss=accept_loss)
        if found is None:
            return None
        offer, bundle = found
        try:
            entry = self._extract(bundle, offer, accept_loss=accept_loss)
        except UpdateRefusedError as error:
            if error.reason in ("board", "budget", "schema", "pointer", "learned-loss"):
                self.rule_out(offer.sha256, error)
            raise
        finally:
            bundle.unlink()
        return self._prove(entry)

    def accepts(self, *, accept_loss: bool) -> bool:
        """Whether a taught class may be dropped: because it is asked for, or by configuration."""
        return accept_loss or self._config.update.on_learned_loss == DROP

    def _fetch(
        self, source: Path | str, channel: str, *, force: bool, is_free: bool, accept_loss: bool
    ) -> "tuple[Offer, Path] | None":
        """What the channel offers and its verified file; None when it is served already."""
        from device.tuf_client import UpdateSource, open_source  # here: 0.1 s at every start of the agent otherwise

        config = self._config.update
        pace = Pace(config.max_bytes_per_s, refusal=lambda: self._why_stop(is_free=is_free), pause=self._stop.wait)
        ca_file = self._root / config.ca_file if config.ca_file else None
        with closing(open_source(source, ca_file=ca_file)) as fetch:
            update_source = UpdateSource(fetch, self._root, time=self._time, pace=pace)
            offer = update_source.offer(channel)
            if not self._is_wanted(offer, force=force, accept_loss=accept_loss):
                return None
            return offer, self._download(update_source, offer)

    def _is_wanted(self, offer: "Offer", *, force: bool, accept_loss: bool) -> bool:
        """False when it is served already; UpdateRefusedError when it is known to be unfit, or is no step forward."""
        serving = self._slots.serving()
        if serving and serving.bundle == offer.sha256:
            return False
        if serving and offer.release <= serving.release:
            raise UpdateRefusedError(
                "rollback",
                f"{offer.bundle}: release {offer.release} is not newer than {serving.name} {serving.version}, release {serving.release}",
            )
        rejection = self._slots.rejection(offer.sha256)
        if rejection and not force and _still_holds(rejection):
            raise UpdateRefusedError(
                "rejected-before",
                f"{offer.bundle}: was rejected here before ({rejection.reason}); publish a newer one, or use --force",
            )
        if (
            self._unfit
            and self._unfit.sha256 == offer.sha256
            and not force
            and self._is_still(self._unfit, accept_loss)
        ):
            raise UpdateRefusedError(self._unfit.refusal.reason, str(self._unfit.refusal))
        return True

    def _is_still(self, unfit: _Unfit, accept_loss: bool) -> bool:
        if unfit.refusal.reason != "learned-loss" or self._learned is None:
            return True
        return not accept_loss and unfit.learned_version == self._learned.learned_version

    def _download(self, source: "UpdateSource", offer: "Offer") -> Path:
        log.info("downloading %s, %d bytes", offer.bundle, offer.bytes)
        max_bytes = BUNDLE_PER_ARTIFACT * self._board.budget.artifact_bytes + BUNDLE_EXTRA_BYTES
        fetched = source.download(offer, max_bytes=max_bytes, held=self._held())
        log.info("%s: %d of %d bytes were transferred", offer.bundle, fetched.transferred_bytes, offer.bytes)
        self._report("downloaded", bundle=offer.bundle, bytes=offer.bytes, transferred_bytes=fetched.transferred_bytes)
        return fetched.path

    def _why_stop(self, *, is_free: bool) -> UpdateRefusedError | None:
        """Asked between two chunks of a transfer."""
        self._alive()
        if self._stop.is_set():
            return UpdateRefusedError(
                "interrupted", "the agent stops during the transfer; it will go on at the next look"
            )
        if not is_free and not self._schedule.is_open():
            return UpdateRefusedError(
                "window", "update.window closed during the transfer; it will go on in the next one"
            )
        return None

    def _held(self) -> dict[str, Path]:
        """The files in the slots by SHA-256, as their manifests say; they are checked when a bundle was made of them."""
        held: dict[str, Path] = {}
        for slot in NAMES:
            directory = self._slots.directory(slot)
            try:
                entries = read_manifest(directory).files if directory.is_dir() else {}
            except (ArtifactError, OSError):
                continue
            held |= {entry.sha256: directory / name for name, entry in entries.items() if (directory / name).is_file()}
        return held

    def _extract(self, bundle: Path, offer: "Offer", *, accept_loss: bool) -> Entry:
        with _refusing(bundle):
            manifest = read_manifest(bundle)
            _require_offered(manifest, offer)
            self._require_fit(manifest)
            if not accept_loss:
                self._require_kept(manifest)
            return self._slots.stage(offer.sha256, lambda directory: extract(bundle, directory))

    def _require_kept(self, manifest: Manifest) -> None:
        """Refuse what would drop a taught class whichever artifact is chosen, before a slot is emptied for it."""
        fate = self._fate(manifest, self._candidates(manifest)[0])
        if fate.dropped:
            raise loss_refusal(manifest, fate)

    def _fate(self, manifest: Manifest, artifact: Artifact) -> Fate:
        return self._learned.forecast(manifest, artifact) if self._learned else Fate()

    def _prove(self, entry: Entry) -> Staged:
        slot = self._slots.directory(entry.slot)
        manifest = read_manifest(slot)
        try:
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
        return Staged(slot=entry.slot, bundle=entry.bundle, manifest=manifest, test=test)

    def _fastest_that_passes(self, slot: Path, artifacts: list[Artifact]) -> "SelfTest":
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

    def _try(self, slot: Path, artifact: Artifact) -> "SelfTest":
        self._require_size(artifact, (slot / artifact.path).stat().st_size)
        try:
            return self._test(slot, artifact)
        except _PerhapsBusyError as error:
            log.warning("testing once more, the board may have been busy: %s", error)
        return self._test(slot, artifact)

    def _run_in_child(self, slot: Path, precision: str) -> "SelfTest":
        from device.selftest import run_in_child  # here: the first frame need not wait for what starts processes

        runtime = resolve_runtime(self._board, self._config.runtime)
        caches = self._root / TEST_CACHES if runtime.weight_cache else None
        return run_in_child(
            slot, precision, threads=runtime.threads, delegate=runtime.delegate, caches=caches, stop=self._stop
        )

    def _test(self, slot: Path, artifact: Artifact) -> "SelfTest":
        budget = self._board.budget
        try:
            test = self._run_selftest(slot, artifact.precision)
        except NoVerdictError as error:
            raise _PerhapsBusyError("selftest", str(error)) from error
        except RuntimeMismatchError as error:
            raise UpdateRefusedError("runtime", str(error)) from error
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
        """Those that this board may run, and of them those that keep most of what was taught here."""
        found = candidates(manifest, self._board, self._config.precision)
        lost = [len(self._fate(manifest, artifact).dropped) for artifact in found]
        return [artifact for artifact, count in zip(found, lost, strict=True) if count == min(lost)]


@contextmanager
def _refusing(bundle: Path) -> Iterator[None]:
    """Every reason that a bundle's own content gives against it, as a refusal."""
    try:
        yield
    except AgentBusyError as error:
        raise UpdateRefusedError("busy", str(error)) from error
    except BoardMismatchError as error:
        raise UpdateRefusedError("board", str(error)) from error
    except SchemaError as error:
        raise UpdateRefusedError("schema", f"{bundle.name}: {error}") from error
    except ArtifactError as error:
        raise UpdateRefusedError("damaged", f"{bundle.name}: {error}") from error


def _still_holds(rejection: Entry) -> bool:
    """What one runtime cannot run, another may; the detail names the one that refused."""
    return rejection.reason != "runtime" or runtime_name() in rejection.detail


def fastest(tests: list["SelfTest"]) -> "SelfTest":
    """The test with the lowest latency; of those that are as fast within the bounds above, the first."""
    best = min(test.latency_p50_ms for test in tests)
    limit = max(SAME_SPEED * best, best + SAME_SPEED_MS)
    return next(test for test in tests if test.latency_p50_ms <= limit)


def _require_offered(manifest: Manifest, offer: "Offer") -> None:
    """The channel and the bundle it names were signed apart: they must agree about what this is."""
    name = f"{manifest.name}-{manifest.version}.fieldvit"
    if name != offer.bundle or manifest.release != offer.release:
        raise UpdateRefusedError(
            "pointer",
            f"{offer.bundle}: its manifest says {name}, release {manifest.release}; "
            f"the channel says release {offer.release}: publish it again",
        )


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
