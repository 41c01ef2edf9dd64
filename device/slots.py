"""Two slots for a model, and a journal that says what each holds.

    ROOT/slots/a, ROOT/slots/b    extracted bundles
    ROOT/journal.jsonl            empty -> staged -> testing -> confirmed, or -> rejected with a reason
    ROOT/current                  link to the slot that is served

Why a journal *and* a link: two facts cannot be changed by one write, so one of them must follow from the other. The last
line of each slot in the journal is the truth: the slot in `testing` is served, or else the slot confirmed last. Every
change of state is one synced line, written before the link is moved by one rename; `recover` moves the link to where the
journal points. The order of an update that goes from slot a to slot b:

    1. b `empty`      from here on nobody falls back to b
    2. old b removed, bundle extracted to slots/b.tmp and synced, renamed to slots/b
    3. b `staged`     whole, never run; a cut before this line leaves rubbish, a cut after it an unproven model: both go
    4. child process passes -> b `testing`, then the link moves to b
    5. soak passes -> b `confirmed`; a stays as the model to fall back to
       or fails    -> b `rejected`, then the link moves back to a

The slot that is served or would be fallen back to is never written.

Crash loops. A start on a model in testing is a line of its own; so is a start on a confirmed one after its agent died (not
after power was lost: that is no fault of the model). Lines within `CRASH_WINDOW_S` count, a start that was stopped in good
order does not. Too many of them reject the model, a confirmed one only where another confirmed model can take over.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from device.contract.errors import AgentBusyError, ArtifactError
from device.contract.files import sync_directory
from device.contract.manifest import Manifest
from device.journal import Entry, Journal

NAMES = ("a", "b")
MAX_TEST_STARTS = 3
"""Starts of a model in testing within the window; the next one rejects it."""
MAX_TEST_STARTS_EVER = 10
"""The same however long it took: a board without a clock may not know."""
MAX_CRASHES = 5
"""Crashes of a confirmed model within the window; the next one goes back to the other."""
CRASH_WINDOW_S = 600.0
STOPPED, CRASHED = "stopped", "crashed"

log = logging.getLogger(__name__)

Extract = Callable[[Path], Manifest]
"""Writes a bundle into the directory it is given, synced, and returns its manifest."""


class Slots:
    """The slots of one data directory. Reading works beside a running agent; only the lock's holder may change them."""

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._lock = threading.RLock()
        self._journal = Journal(root / "journal.jsonl")

    def directory(self, slot: str) -> Path:
        return self.root / "slots" / slot

    def state(self, slot: str) -> Entry:
        """The last entry of a slot."""
        for entry in reversed(self.history()):
            if entry.slot == slot:
                return entry
        return Entry(number=0, time=0.0, slot=slot, state="empty")

    def serving(self) -> Entry | None:
        """The slot to serve: the one in testing, or else the one confirmed last."""
        states = [self.state(slot) for slot in NAMES]
        testing = [entry for entry in states if entry.state == "testing"]
        return testing[0] if testing else self.fallback(states)

    def fallback(self, states: list[Entry] | None = None) -> Entry | None:
        """The slot that was confirmed last."""
        confirmed = [entry for entry in states or [self.state(slot) for slot in NAMES] if entry.state == "confirmed"]
        return max(confirmed, key=lambda entry: entry.number, default=None)

    def history(self, after: int = 0) -> list[Entry]:
        """All entries with a higher number, oldest first. Takes no lock: a long `stage` must not stop the frame loop."""
        return [entry for entry in tuple(self._journal.entries) if entry.number > after]

    @property
    def last_number(self) -> int:
        """The number of the newest entry."""
        return self._journal.entries[-1].number if self._journal.entries else 0

    def rejection(self, bundle: str) -> Entry | None:
        """The entry that rejected this bundle (by SHA-256), unless it was confirmed since.

        A confirmed model that cannot be loaded any more says that its slot is damaged, nothing about the bundle.
        """
        for entry in reversed(self.history()):
            if entry.bundle == bundle and entry.state in ("confirmed", "rejected"):
                is_damage = entry.was == "confirmed" and entry.reason == "load"
                return entry if entry.state == "rejected" and not is_damage else None
        return None

    def recover(self, *, is_start: bool, crash: str = "") -> list[str]:
        """Make slots, journal and link agree after any interruption; returns what was done, for the log.

        Args:
            is_start: the agent starts to serve, which counts against a model in testing.
            crash: how the agent before died, which counts against a confirmed model; empty: it did not, or power was lost.
        """
        with self._lock:
            done = []
            if self._journal.damaged_lines:
                done.append(f"{self._journal.path}: {self._journal.damaged_lines} damaged lines are ignored")
            self._journal.compact([self.state(slot) for slot in NAMES])
            for slot in NAMES:
                done += self._recover_slot(self.state(slot), is_start=is_start)
            done += self._count_crash(crash) if crash and is_start else []
            self._remove_rubbish()
            self._point_link()
            return done

    def stage(self, bundle: str, extract: Extract) -> Entry:
        """Fill the spare slot.

        Args:
            bundle: the bundle's SHA-256.
            extract: writes it; what it raises leaves the slot empty.

        Raises:
            AgentBusyError: a model is still in testing, so there is no spare slot.
        """
        with self._lock:
            slot = self._spare()
            self._record(Entry(number=0, time=0.0, slot=slot, state=self.state(slot).state), "empty")
            final, partial = self.directory(slot), self.directory(f"{slot}.tmp")
            self._remove_rubbish()
            try:
                manifest = extract(partial)
            except Exception:
                self._remove_rubbish()  # on a full disk, half a bundle takes the room that the journal needs
                raise
            os.replace(partial, final)
            sync_directory(final.parent)
            entry = replace(
                self.state(slot), bundle=bundle, name=manifest.name, version=manifest.version, release=manifest.release
            )
            return self._record(entry, "staged")

    def begin_testing(self, slot: str, precision: str) -> Entry:
        """Serve a staged slot, on probation."""
        with self._lock:
            entry = self._record(replace(self.state(slot), precision=precision, starts=0), "testing")
            self._point_link()
            return entry

    def confirm(self, slot: str) -> Entry:
        """End a probation well."""
        with self._lock:
            return self._record(self.state(slot), "confirmed")

    def stop(self) -> None:
        """The agent stops in good order: this start is not held against a model in testing."""
        with self._lock:
            for slot in NAMES:
                entry = self.state(slot)
                if entry.state == "testing" and entry.starts and entry.reason != STOPPED:
                    self._record(replace(entry, starts=entry.starts - 1), "testing", reason=STOPPED)

    def reject_hanging(self, slot: str, detail: str, *, timeout_s: float) -> bool:
        """Reject a model in testing from beside a thread that hangs, and perhaps holds the lock; False if it does."""
        if not self._lock.acquire(timeout=timeout_s):
            return False
        try:
            if self.state(slot).state == "testing":
                self.reject(slot, "hang", detail)
            return True
        finally:
            self._lock.release()

    def reject(self, slot: str, reason: str, detail: str = "") -> Entry:
        """Take a slot out of service for good, and serve the one confirmed last."""
        with self._lock:
            entry = self._record(self.state(slot), "rejected", reason=reason, detail=detail)
            self._point_link()
            return entry

    def give_way(self, slot: str, other: str, reason: str, detail: str) -> bool:
        """Reject a slot in favour of the other; False where an update has begun to fill that one meanwhile."""
        if self.state(other).state != "confirmed":  # without the lock, which that update holds for long
            return False
        with self._lock:
            if self.state(other).state != "confirmed":
                return False
            self.reject(slot, reason, detail)
            return True

    def discard(self, slot: str, reason: str) -> Entry:
        """Empty a staged slot without a verdict: the same bundle may come again."""
        with self._lock:
            return self._record(self.state(slot), "empty", reason=reason)

    def has_other(self, slot: str) -> bool:
        """Whether there is a confirmed model beside this slot's."""
        return any(name != slot and self.state(name).state == "confirmed" for name in NAMES)

    def rollback_target(self) -> Entry:
        """The slot that `rollback` would go back to; ArtifactError when there is none."""
        serving = self.serving()
        for slot in NAMES:
            entry = self.state(slot)
            if serving and slot != serving.slot and entry.state == "confirmed":
                return entry
        raise ArtifactError(
            "there is no earlier confirmed model to go back to; install one with 'fieldvit-device update'"
        )

    def _spare(self) -> str:
        keep = self.fallback()
        for slot in NAMES:
            if self.state(slot).state == "testing":
                raise AgentBusyError(
                    f"slot {slot} is still in testing; let the agent confirm it, or reject it with 'fieldvit-device rollback'"
                )
        return "b" if keep and keep.slot == "a" else "a"

    def _recover_slot(self, entry: Entry, *, is_start: bool) -> list[str]:
        if entry.state == "staged":
            self._record(entry, "empty", reason="interrupted")
            return [f"slot {entry.slot}: {entry.name} {entry.version} was staged but never proven; discarded"]
        if entry.state == "testing" and (starts := self._starts_too_often(entry)):
            return [self._reject_looping(entry, f"{starts} without confirmation")]
        if entry.state == "testing" and is_start:
            self._record(replace(entry, starts=entry.starts + 1), "testing")
        return []

    def _starts_too_often(self, entry: Entry) -> str:
        """How often a model in testing was started, if that is too often."""
        if entry.starts >= MAX_TEST_STARTS_EVER:
            return f"{entry.starts} starts"
        recent = [e for e in self._recent(entry) if e.was == "testing"]
        stops = sum(e.reason == STOPPED for e in recent)
        count = len(recent) - 2 * stops  # a stop, and the start it takes back
        return f"{count} starts within {CRASH_WINDOW_S / 60:.0f} minutes" if count >= MAX_TEST_STARTS else ""

    def _count_crash(self, crash: str) -> list[str]:
        entry = self.serving()
        if entry is None or entry.state != "confirmed":
            return []
        crashes = [e for e in self._recent(entry) if e.state == "confirmed" and e.reason == CRASHED]
        if len(crashes) >= MAX_CRASHES and self.has_other(entry.slot):
            detail = f"{len(crashes) + 1} crashes within {CRASH_WINDOW_S / 60:.0f} minutes, the last: {crash}"
            return [self._reject_looping(entry, detail)]
        self._record(entry, "confirmed", reason=CRASHED, detail=crash)
        return [f"slot {entry.slot}: the agent before died while it served {entry.name} {entry.version} ({crash})"]

    def _reject_looping(self, entry: Entry, detail: str) -> str:
        self._record(entry, "rejected", reason="crash-loop", detail=detail)
        return f"slot {entry.slot}: {entry.name} {entry.version} rejected after {detail}"

    def _recent(self, entry: Entry) -> list[Entry]:
        """A slot's entries since it came into its state, without those that are surely older than the window.

        A clock that went back says nothing, so an entry from the future counts.
        """
        found: list[Entry] = []
        for earlier in reversed([e for e in self.history() if e.slot == entry.slot]):
            if earlier.state != entry.state or self._clock() - earlier.time > CRASH_WINDOW_S:
                break
            found.append(earlier)
            if earlier.was != earlier.state:
                break
        return found

    def _record(self, entry: Entry, state: str, *, reason: str = "", detail: str = "") -> Entry:
        new = replace(
            entry,
            number=self.last_number + 1,
            time=self._clock(),
            state=state,
            was=entry.state,
            reason=reason,
            detail=detail,
        )
        self._journal.append(new)
        return new

    def _remove_rubbish(self) -> None:
        self.directory("a").parent.mkdir(parents=True, exist_ok=True)
        for slot in NAMES:
            shutil.rmtree(self.directory(f"{slot}.tmp"), ignore_errors=True)
            if self.state(slot).state == "empty":
                shutil.rmtree(self.directory(slot), ignore_errors=True)

    def _point_link(self) -> None:
        """Move the link to where the journal points; what fails here, the next change or start does."""
        try:
            self._move_link()
        except OSError as error:  # the journal has the truth already: a caller must not think that nothing happened
            log.error("%s: cannot be moved (%s); make room, or check the disk", self.root / "current", error)

    def _move_link(self) -> None:
        link, serving = self.root / "current", self.serving()
        if serving is None:
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or os.readlink(link) != f"slots/{serving.slot}":
            partial = self.root / "current.tmp"
            partial.unlink(missing_ok=True)
            partial.symlink_to(f"slots/{serving.slot}")
            os.replace(partial, link)
        sync_directory(self.root)
