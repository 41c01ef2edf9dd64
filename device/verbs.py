"""What a command makes the agent do. Runs in worker threads."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from device.ask import attachment_path, read_attachment
from device.commands import Handler, RestoreArguments
from device.config import resolve_source
from device.contract.commands import LearnArguments, NoArguments, UndoArguments, UpdateArguments
from device.contract.errors import ArtifactError, ConfigError, DeviceError, LearningError, UpdateRefusedError, one_line
from device.contract.records import to_table
from device.migration import Migration
from device.modules import forbidden_modules, third_party_modules
from device.reporter import Reporter
from device.runtime import runtime_name
from device.serving import Model, Serving
from device.slots import Slots
from device.updater import Preview, Updater

log = logging.getLogger(__name__)

_SHOWN = ("slot", "state", "name", "version", "release", "precision")


class Verbs:
    """Obeys commands.

    Args:
        root: where a relative update source starts.
        source: the configured update source.
        announce: tells the world that the state has changed.
        status: figures of the frame loop and the connection, for `status`.
    """

    def __init__(
        self,
        root: Path,
        source: str,
        *,
        slots: Slots,
        serving: Serving,
        updater: Updater,
        reporter: Reporter,
        announce: Callable[[], None],
    ) -> None:
        self._root, self._source = root, source
        self._slots, self._serving, self._updater, self._reporter = slots, serving, updater, reporter
        self._announce = announce
        self._last_refusal = ""
        self.last_check: dict[str, Any] = {}
        """How the last look for an update ended: number, time, outcome (staged, current, refused), reason, detail."""
        self._checking = threading.Lock()
        self._installing = threading.Lock()

    def handlers(self, status: Callable[[], dict[str, Any]]) -> dict[str, Handler]:
        """One handler for each verb about the model; the agent adds those about itself."""
        return {
            "learn": self._learn,
            "undo": self._undo,
            "restore": self._restore,
            "update": self._update,
            "rollback": self._rollback,
            "status": lambda *_: status(),
        }

    def check_for_update(self) -> None:
        """An update nobody asked for: a refusal is reported once, not at each look."""
        try:
            self._install(resolve_source(self._source, self._root), UpdateArguments(), is_asked=False)
        except DeviceError as error:
            log.warning("no update: %s", error)

    def request_check(self, submit: Callable[[Callable[[], None]], bool]) -> None:
        """Have a worker look for an update, unless a look waits or runs already: commands must not wait behind many."""
        if self._checking.acquire(blocking=False) and not submit(self._requested_check):
            self._checking.release()

    def _requested_check(self) -> None:
        try:
            self.check_for_update()
        finally:
            self._checking.release()

    def wait(self, timeout_s: float) -> None:
        """Give an update that the agent's stop interrupts the time to put its slot in order."""
        if self._installing.acquire(timeout=timeout_s):
            self._installing.release()

    def _update(self, arguments: UpdateArguments, _: str) -> dict[str, Any]:
        source = resolve_source(arguments.source or self._source, self._root)
        if arguments.dry_run:
            with self._installing:
                preview = self._updater.preview(source, channel=arguments.channel, force=arguments.force)
                return preview_table(preview)
        return self._install(source, arguments, is_asked=True)

    def _install(self, source: Path | str, arguments: UpdateArguments, *, is_asked: bool) -> dict[str, Any]:
        mark = self._slots.last_number
        with self._installing:
            try:
                migration = install(
                    self._updater,
                    self._serving,
                    source,
                    channel=arguments.channel,
                    force=arguments.force,
                    is_asked=is_asked,
                    accept_loss=arguments.accept_loss,
                )
                self._last_refusal = ""
                self._remember("staged" if migration else "current")
            except DeviceError as error:
                self._remember("refused", reason=refusal_reason(error), detail=one_line(error))
                self._report_refusal(error, mark, is_asked=is_asked)
                raise
        if migration:
            report_migration(self._reporter, migration)
        learned = {"learned": to_table(migration.fate)} if migration else {}
        return {"updated": migration is not None} | serving_table(self._slots) | learned

    def _remember(self, outcome: str, *, reason: str = "", detail: str = "") -> None:
        number = self.last_check.get("number", 0) + 1
        self.last_check = {
            "number": number,
            "time": time.time(),
            "outcome": outcome,
            "reason": reason,
            "detail": detail,
        }
        self._announce()

    def _report_refusal(self, error: DeviceError, mark: int, *, is_asked: bool) -> None:
        """Report it, unless it came so far that the journal holds it and its event follows from there.

        An agent that stops, or whose maintenance window closes, reports nothing: the update is tried again.
        """
        reason = refusal_reason(error)
        if reason in ("interrupted", "window"):
            return
        is_journaled = any(entry.state == "rejected" for entry in self._slots.history(after=mark))
        if not is_journaled and (is_asked or reason != self._last_refusal):
            self._reporter.event("refused", reason=reason, detail=one_line(error))
        self._last_refusal = reason

    def _rollback(self, _: NoArguments, __: str) -> dict[str, Any]:
        before = self._serving.model
        model = self._serving.rollback()
        return serving_table(self._slots) | {"dropped": unknown_to(model, before)}

    def was_done(self, command_id: str) -> dict[str, Any] | None:
        """The result of a lesson that was learned or taken back, though the agent stopped before it could say so."""
        model = self._serving.model
        if model is None or not model.classifier.has_learned(command_id):
            return None
        head = model.classifier.head
        return {"classes": len(head.labels), "version": head.version}

    def _learn(self, arguments: LearnArguments, command_id: str) -> dict[str, Any]:
        model = self._serving.model
        if model is None:
            raise ArtifactError("there is no model to teach; send an update first")
        is_by_frame = bool(arguments.frame_ids)
        try:
            if arguments.backbone not in (None, model.artifact.backbone):
                raise LearningError("the features are of another backbone than the one that serves; take them anew")
            features = model.ring.get(arguments.frame_ids) if is_by_frame else _feature_matrix(arguments.features)
            head = model.classifier.learn(
                features, arguments.label, lesson=command_id, is_served=lambda: self._serving.model is model
            )
            if self._serving.model is not model:
                raise LearningError("the model was replaced just after it had learned this; teach the new one too")
        except LearningError as error:
            self._reporter.event("error", reason="learn", detail=one_line(error))
            raise
        result = {
            "label": arguments.label,
            "examples": len(features),
            "classes": len(head.labels),
            "version": head.version,
        }
        self._reporter.event("learned", **result)
        self._announce()
        return result

    def _undo(self, arguments: UndoArguments, command_id: str) -> dict[str, Any]:
        model = self._serving.model
        if model is None:
            raise ArtifactError("there is no model, so there is nothing to take back")
        head, lesson = model.classifier.undo(
            arguments.lesson or "", command=command_id, is_served=lambda: self._serving.model is model
        )
        result = {
            "lesson": lesson.id,
            "label": lesson.label,
            "examples": len(lesson.features),
            "classes": len(head.labels),
            "version": head.version,
        }
        self._reporter.event("unlearned", reason="undo", **result)
        self._announce()
        return result

    def _restore(self, arguments: RestoreArguments, command_id: str) -> dict[str, Any]:
        """Put a backup in place of what was learned here."""
        from device.backup import head_of_backup, max_backup_bytes  # here: once in a board's life

        model = self._serving.model
        if model is None:
            raise ArtifactError("there is no model that a backup could belong to; send an update first")
        path = attachment_path(self._root, command_id)
        before, classifier = model.classifier.head, model.classifier
        head = head_of_backup(
            read_attachment(path, max_backup_bytes(model.manifest.learning)),
            Path("backup"),
            classifier,
            device=self._reporter.device,
            manifest=model.manifest,
            artifact=model.artifact,
        )
        lost = [label for label in classifier.taught if label not in head.labels]
        if lost and not arguments.accept_loss:
            raise LearningError(
                f"the backup does not know {', '.join(map(repr, lost))}, taught since; "
                "export what is there first, then import with --accept-loss"
            )
        new = classifier.restore(head, before=before, is_served=lambda: self._serving.model is model)
        result = {"labels": list(new.labels[len(classifier.base.labels) :]), "version": new.version, "dropped": lost}
        self._reporter.event("learned", reason="restored", **result)
        self._announce()
        return result | {"classes": len(new.labels)}


def install(
    updater: Updater,
    serving: Serving,
    source: Path | str,
    *,
    force: bool,
    channel: str | None = None,
    is_asked: bool = True,
    accept_loss: bool = False,
) -> Migration | None:
    """Stage what the source offers and serve it on probation; None when there is nothing to do."""
    staged = updater.stage(source, channel=channel, force=force, is_asked=is_asked, accept_loss=accept_loss)
    if staged is None:
        return None
    try:
        return serving.activate(
            staged.slot, staged.test.precision, accept_loss=updater.accepts(accept_loss=accept_loss)
        )
    except UpdateRefusedError as error:
        if error.reason == "learned-loss":
            updater.rule_out(staged.bundle, error)
        raise


def report_migration(reporter: Reporter, migration: Migration) -> None:
    """Tell what moved to a new model, and what it does not know any more."""
    fate, figures = migration.fate, migration.figures
    if migration.head and figures:
        shares = {name: round(value, 4) for name, value in to_table(figures).items() if name != "taught_before"}
        reporter.event(
            "migrated",
            labels=list(fate.migrated),
            version=migration.head.version,
            left=dict(migration.reasons),
            **shares,
        )
    if fate.dropped:
        reporter.event("unlearned", reason="dropped", labels=list(fate.dropped), why=dict(migration.reasons))


def preview_table(preview: Preview | None) -> dict[str, Any]:
    """What `update` would do, for replies and `--json`."""
    if preview is None:
        return {"would_update": False}
    manifest = preview.manifest
    offered = {"name": manifest.name, "version": manifest.version, "release": manifest.release}
    return {"would_update": True, "offered": offered, "learned": to_table(preview.fate)}


def unknown_to(model: Model | None, before: Model | None) -> list[str]:
    """The classes taught to the model before that another does not know."""
    known = model.classifier.head.labels if model else ()
    return [label for label in (before.classifier.taught if before else ()) if label not in known]


def refusal_reason(error: DeviceError) -> str:
    """The stable word for a refused update."""
    if isinstance(error, UpdateRefusedError):
        return error.reason
    return "config" if isinstance(error, ConfigError) else "load"


def serving_table(slots: Slots) -> dict[str, Any]:
    """What is served, for replies and `--json`."""
    entry = slots.serving()
    table = to_table(entry) if entry else {"state": "empty"}
    return {name: table.get(name) for name in _SHOWN}


def status_table(slots: Slots, serving: Serving, boot: str) -> dict[str, Any]:
    """What is served, what was learned, and which code is loaded."""
    model = serving.model
    return serving_table(slots) | {
        "boot": boot,
        "pid": os.getpid(),
        "time": time.time(),
        "labels": list(model.classifier.head.labels) if model else [],
        "learned_version": model.classifier.head.version if model else 0,
        "runtime": runtime_name(),
        "delegate": model.engine.delegate if model else "",
        "delegate_problem": model.engine.delegate_problem if model else "",
        "taught": list(model.classifier.taught) if model else [],
        "modules_ok": not forbidden_modules(),
        "modules": third_party_modules(),
    }


def _feature_matrix(rows: tuple[tuple[float, ...], ...]) -> np.ndarray:
    if len({len(row) for row in rows}) != 1:
        raise LearningError("features: rows have different lengths")
    return np.array(rows, np.float32)  # [n, D]
