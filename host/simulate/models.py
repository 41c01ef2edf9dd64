"""What a simulated board serves and knows, and how that changes: update, probation, rollback, learn, undo.

The events, replies and reasons are those of the agent's `device/updater.py`, `device/serving.py` and `device/verbs.py`;
a download and a self-test take their time and do nothing.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from device.contract.board import Board
from device.contract.commands import LearnArguments, NoArguments, UndoArguments, UpdateArguments
from device.contract.errors import (
    AgentBusyError,
    ConfigError,
    DeviceError,
    LearningError,
    UpdateRefusedError,
    one_line,
)
from host.simulate.channel import Channel
from host.simulate.config import Timing
from host.simulate.head import Fate, Head, Lesson, loss_refusal
from host.simulate.release import Release
from host.simulate.slots import Slot, Slots

Result = dict[str, Any]
AFTERWARDS = ("latency", "errors", "drift")
"""What is wrong with a bad model only once it is confirmed."""


class Event(Protocol):
    """Reports an event: its kind, and what belongs to it."""

    def __call__(self, kind: str, **data: Any) -> None: ...


class Sources:
    """The update sources that boards of one process name; each channel is verified once for all of them."""

    def __init__(self, repository: Path | None, channel: str) -> None:
        self._repository, self._channel = repository, channel
        self._channels: dict[tuple[Path, str], Channel] = {}

    def offer(self, source: str | None = None, channel: str | None = None) -> Release:
        """What a channel offers in a `dir:PATH`, each None: the configured one; UpdateRefusedError why not."""
        if source is None and self._repository is None:
            raise UpdateRefusedError("unreachable", "no update source; start the simulation with --updates DIR")
        if source is not None and not source.startswith("dir:"):
            raise ConfigError(f"update.source {source!r}: a simulated board reads dir:PATH only")
        path = Path(source.removeprefix("dir:")) if source else self._repository
        assert path is not None
        name = channel or self._channel
        return self._channels.setdefault((path, name), Channel(path, name)).offer()


class Models:
    """The models of one board.

    Args:
        release: what it was flashed with.
        board: its profile.
        sources: where updates come from.
        timing: how long things take.
        bad_releases: the effect of each release that is bad here.
        event: reports one.
        announce: has the birth published again.
        start: runs a coroutine for as long as this boot lasts.
        clock: the board's wall clock, Unix seconds.
        frames_per_s: how many frames are looked at now.
        has_frame: whether a frame, by its id, is still known.
    """

    def __init__(
        self,
        release: Release,
        board: Board,
        *,
        sources: Sources,
        timing: Timing,
        bad_releases: dict[int, str],
        event: Event,
        announce: Callable[[], None],
        start: Callable[[Coroutine[Any, Any, None]], None],
        clock: Callable[[], float],
        frames_per_s: Callable[[], float],
        has_frame: Callable[[str], bool],
    ) -> None:
        self._board, self._sources, self._timing, self._bad_releases = board, sources, timing, bad_releases
        self._event, self._announce, self._start, self._clock = event, announce, start, clock
        self._frames_per_s, self._has_frame = frames_per_s, has_frame
        self.precision = require_precision(release, board)
        self.slots = Slots(release, self.precision)
        self._heads = {self.slots.serving.slot: Head(release=release, backbone=release.backbone(self.precision))}
        self.last_check: Result = {}

    @property
    def head(self) -> Head:
        return self._heads[self.slots.serving.slot]

    @property
    def effect(self) -> str:
        """What the model that serves does wrong now; "" when it is well."""
        serving = self.slots.serving
        effect = self._bad_effect(serving.release)
        return effect if effect in AFTERWARDS and serving.state == "confirmed" else ""

    def resume(self) -> None:
        """The board has booted: a model on probation begins it anew, what was staged is discarded."""
        self.slots.discard_staged()
        if self.slots.is_testing:
            self._start(self._probation(self.slots.serving))

    async def update(self, arguments: UpdateArguments, _: str) -> Result:
        if arguments.dry_run:
            return self._preview(arguments)
        try:
            fate = await self._install(arguments)
        except DeviceError as error:
            reason = _reason(error)
            self._remember("refused", reason=reason, detail=one_line(error))
            if reason != "selftest":  # that one stands in the journal, and was reported from there
                self._event("refused", reason=reason, detail=one_line(error))
            raise
        self._remember("current" if fate is None else "staged")
        learned = {} if fate is None else {"learned": asdict(fate)}
        return {"updated": fate is not None} | self.slots.table() | learned

    async def rollback(self, _: NoArguments, __: str) -> Result:
        target = self.slots.other()
        before = self.head
        rejected = self.slots.reject(self.slots.serving, "rolled-back")
        self._serve_again(target, before)
        self._event("rolled-back", **rejected.facts(), reason="rolled-back", detail="by the operator")
        return self.slots.table() | {"dropped": [label for label in before.taught if label not in self.head.labels]}

    def learn(self, arguments: LearnArguments, command_id: str) -> Result:
        lesson = Lesson(id=command_id, label=arguments.label, examples=len(arguments.frame_ids or arguments.features))
        try:
            if arguments.backbone not in (None, self.head.backbone):
                raise LearningError("the features are of another backbone than the one that serves; take them anew")
            for frame_id in arguments.frame_ids:
                if not self._has_frame(frame_id):
                    raise LearningError(
                        f"frame {frame_id!r} is not among the last frames; send a newer frame or its features"
                    )
            if arguments.features:
                self.head.require_fit(arguments.features)
            head = self.head.learn(lesson)
        except LearningError as error:
            self._event("error", reason="learn", detail=one_line(error))
            raise
        result = self._teach(head, lesson)
        self._event("learned", **result)
        return result

    def undo(self, arguments: UndoArguments, _: str) -> Result:
        head, lesson = self.head.undo(arguments.lesson or "")
        result = {"lesson": lesson.id} | self._teach(head, lesson)
        self._event("unlearned", reason="undo", **result)
        return result

    def _teach(self, head: Head, lesson: Lesson) -> Result:
        self._heads[self.slots.serving.slot] = head
        self._announce()
        return {
            "label": lesson.label,
            "examples": lesson.examples,
            "classes": len(head.labels),
            "version": head.version,
        }

    def _preview(self, arguments: UpdateArguments) -> Result:
        release = self._sources.offer(arguments.source, arguments.channel)
        if not self._is_wanted(release, force=arguments.force):
            return {"would_update": False}
        offered = {"name": release.name, "version": release.version, "release": release.release}
        fate = self.head.forecast(release, require_precision(release, self._board))
        return {"would_update": True, "offered": offered, "learned": asdict(fate)}

    async def _install(self, arguments: UpdateArguments) -> Fate | None:
        """Bring what the channel offers into the spare slot and serve it on probation; None when it is served already."""
        release = self._sources.offer(arguments.source, arguments.channel)
        if not self._is_wanted(release, force=arguments.force):
            return None
        await asyncio.sleep(release.bytes / self._timing.transfer_bytes_per_s)
        bundle = f"{release.name}-{release.version}.fieldvit"
        self._event("downloaded", bundle=bundle, bytes=release.bytes, transferred_bytes=release.bytes)
        precision = require_precision(release, self._board)
        fate = self.head.forecast(release, precision)
        if fate.dropped and not arguments.accept_loss:
            raise loss_refusal(release, fate)
        try:
            slot = self.slots.stage(release)
        except AgentBusyError as error:
            raise UpdateRefusedError("busy", str(error)) from error
        await asyncio.sleep(self._timing.selftest_s)
        self._require_passed(slot, precision)
        self._begin_probation(slot, precision, fate)
        return fate

    def _is_wanted(self, release: Release, *, force: bool) -> bool:
        """False when it is served already; UpdateRefusedError when it is no step forward, or failed here before."""
        serving = self.slots.serving.release
        assert serving is not None
        bundle = f"{release.name}-{release.version}.fieldvit"
        if serving.sha256 == release.sha256:
            return False
        if release.release <= serving.release:
            raise UpdateRefusedError(
                "rollback",
                f"{bundle}: release {release.release} is not newer than {serving.name} {serving.version}, release {serving.release}",
            )
        if not force and (reason := self.slots.rejection(release.sha256)):
            raise UpdateRefusedError(
                "rejected-before",
                f"{bundle}: was rejected here before ({reason}); publish a newer one, or use --force",
            )
        return True

    def _require_passed(self, slot: Slot, precision: str) -> None:
        if self._bad_effect(slot.release) != "selftest":
            return
        detail = f"{precision}: golden outputs differ"
        rejected = self.slots.reject(slot, "selftest")
        self._event("refused", **rejected.facts(), reason="selftest", detail=detail)
        raise UpdateRefusedError("selftest", detail)

    def _begin_probation(self, slot: Slot, precision: str, fate: Fate) -> None:
        before, release = self.head, slot.release
        assert release is not None
        testing = self.slots.begin_testing(slot, precision)
        self._heads[testing.slot] = before.moved(release, precision)
        self._announce()
        self._event("installed", **testing.facts())
        if fate.migrated:
            self._event("migrated", labels=list(fate.migrated), version=self.head.version, left={})
        if fate.dropped:
            self._event("unlearned", reason="dropped", labels=list(fate.dropped), why={})
        self._start(self._probation(testing))

    async def _probation(self, testing: Slot) -> None:
        """Confirm a model once it has soaked, or give it up half-way; nothing when it was rolled back meanwhile."""
        runtime = self._board.runtime
        soak_s = self._timing.soak_s if self._timing.soak_s is not None else runtime.soak_s
        soak_s = min(soak_s, runtime.soak_frames / max(self._frames_per_s(), 1e-3))
        is_bad = self._bad_effect(testing.release) == "probation"
        await asyncio.sleep(soak_s / 2 if is_bad else soak_s)
        if self.slots.serving is not testing:
            return
        if not is_bad:
            self._event("confirmed", **self.slots.confirm().facts())
            return
        before = self.head
        rejected = self.slots.reject(testing, "budget")
        self._serve_again(self.slots.serving, before)
        limit_ms = self._board.budget.latency_ms
        detail = f"median latency {2 * limit_ms:.1f} ms, {limit_ms:.1f} are allowed"
        self._event("rolled-back", **rejected.facts(), reason="budget", detail=detail)

    def _serve_again(self, slot: Slot, before: Head) -> None:
        """A model that served before serves again, with the head that it had."""
        lost = [label for label in before.taught if label not in self._heads[slot.slot].labels]
        if lost:
            self._event("unlearned", reason="went-back", labels=lost)
        self._announce()

    def _remember(self, outcome: str, *, reason: str = "", detail: str = "") -> None:
        number = self.last_check.get("number", 0) + 1
        found = {"number": number, "time": self._clock(), "outcome": outcome, "reason": reason, "detail": detail}
        self.last_check = found

    def _bad_effect(self, release: Release | None) -> str:
        return self._bad_releases.get(release.release, "") if release else ""


def require_precision(release: Release, board: Board) -> str:
    """Which artifact the board runs; UpdateRefusedError where there is none for it."""
    precision = release.chosen(board.support.precisions)
    if board.name not in release.boards or precision is None:
        raise UpdateRefusedError(
            "board", f"{release.name} {release.version} was built for {', '.join(release.boards)}, not for {board.name}"
        )
    return precision


def _reason(error: DeviceError) -> str:
    """The stable word for a refused update."""
    if isinstance(error, UpdateRefusedError):
        return error.reason
    return "config" if isinstance(error, ConfigError) else "load"
