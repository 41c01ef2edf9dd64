"""Hand tools for what a board has learned: from a shell, whether the agent runs or not.

A running agent is asked (`device.ask`). Where none runs, the same handlers work here, under the data directory's lock, and
what they report goes out with the next connection.
"""

import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from device.ask import ASK_DIRECTORY, attachment_path
from device.classifier import Classifier, read_base_head
from device.commands import LOCAL_ARGUMENTS
from device.config import AgentConfig, beside_agent, resolve_runtime
from device.contract.board import Board
from device.contract.bundle import verify_directory
from device.contract.errors import ArtifactError
from device.contract.manifest import Artifact, Manifest
from device.contract.records import from_table
from device.frames import read_frame
from device.learned import HEAD_NAME, LearnedStore
from device.preprocess import preprocess
from device.reporter import Reporter
from device.serving import Model, Serving
from device.slots import Slots
from device.sources.directory import named_frames
from device.spool import Spool
from device.updater import Updater
from device.verbs import Verbs

log = logging.getLogger(__name__)


def obey_here(
    root: Path,
    config: AgentConfig,
    board: Board,
    verb: str,
    arguments: dict[str, Any],
    *,
    attachment: bytes | None = None,
) -> dict[str, Any]:
    """Do what an agent would do if it ran; the caller holds the data directory's lock.

    Raises:
        DeviceError: as the verb's handler.
    """
    runtime = resolve_runtime(board, config.runtime)
    slots, command_id = Slots(root), uuid.uuid4().hex
    for line in slots.recover(is_start=False):
        log.warning("recovered: %s", line)
    serving = Serving(slots, runtime)
    serving.start()
    spool = Spool(root / "spool.db", max_bytes=runtime.spool_bytes, max_age_s=runtime.spool_age_s)
    path = attachment_path(root, command_id)
    try:
        verbs = Verbs(
            root,
            config.update.source,
            slots=slots,
            serving=serving,
            updater=Updater(root, config, board, slots, learned=serving),
            reporter=Reporter(config.id, board.name, uuid.uuid4().hex[:16], spool),
            announce=lambda: None,
        )
        if attachment is not None:
            (root / ASK_DIRECTORY).mkdir(mode=0o700, exist_ok=True)
            path.write_bytes(attachment)
        record = from_table(LOCAL_ARGUMENTS[verb], arguments, where=verb)
        return verbs.handlers(dict)[verb](record, command_id)
    finally:
        path.unlink(missing_ok=True)
        spool.close()


def learn_arguments(
    root: Path, config: AgentConfig, board: Board, label: str, files: Iterable[Path], frame_ids: Iterable[str]
) -> dict[str, Any]:
    """What the verb `learn` is given: ids of frames that the agent has just seen, or the features of files.

    Raises:
        ArtifactError: no model is installed.
        FrameError: a file cannot be read.
    """
    ids = list(frame_ids)
    if ids:
        return {"label": label, "frame_ids": ids}
    slots = Slots(root)
    entry = slots.serving()
    if entry is None:
        raise ArtifactError(f"{root}: no model is installed; run 'fieldvit-device update'")
    model = Model.load(slots, entry.slot, entry.precision, resolve_runtime(board, beside_agent(config.runtime)))
    spec = model.manifest.input
    frames = (read_frame(path, spec.channels) for _, path in named_frames(files))
    rows = [model.engine.features(preprocess(pixels[None], spec)) for pixels in frames]
    return {"label": label, "features": [_short(row) for row in rows], "backbone": model.artifact.backbone}


def served_classifier(root: Path) -> tuple[Manifest, Artifact, Classifier]:
    """What is served and what it has learned, read beside a running agent; no interpreter is loaded.

    Raises:
        ArtifactError: no model is installed, or its files are damaged.
    """
    slots = Slots(root)
    entry = slots.serving()
    if entry is None:
        raise ArtifactError(f"{root}: no model is installed; run 'fieldvit-device update'")
    slot = slots.directory(entry.slot)
    manifest = verify_directory(slot)
    artifact = manifest.artifact(entry.precision)
    store = LearnedStore(root / "state", artifact.backbone, manifest.files[HEAD_NAME].sha256)
    return manifest, artifact, Classifier(read_base_head(slot, manifest, artifact), manifest, store)


def learned_table(root: Path) -> dict[str, Any]:
    """The classes taught here, and the lessons that can be taken back, newest last."""
    manifest, artifact, classifier = served_classifier(root)
    head, shipped = classifier.head, classifier.base.learner.counts
    own = head.learner.counts.copy()
    own[: len(shipped)] -= shipped
    return {
        "model": f"{manifest.name} {manifest.version} {artifact.precision}",
        "backbone": artifact.backbone,
        "version": head.version,
        "classes": [
            {"label": label, "examples": int(own[head.labels.index(label)]), "shipped": label in manifest.labels}
            for label in classifier.taught
        ],
        "lessons": [{"id": k.id, "label": k.label, "examples": len(k.features)} for k in head.history],
        "problems": list(classifier.problems),
    }


def export_learned(root: Path, config: AgentConfig, path: Path) -> dict[str, Any]:
    """Write a backup of what was learned here.

    Raises:
        ArtifactError: nothing was learned, or the file cannot be written.
    """
    from device.backup import write_backup
    from device.contract.files import write_atomic

    manifest, artifact, classifier = served_classifier(root)
    if classifier.head is classifier.base_head:
        raise ArtifactError(
            f"{root}: nothing was learned on {manifest.name} {manifest.version}; there is nothing to export"
        )
    content = write_backup(
        classifier.head, classifier.base_head, device=config.id, manifest=manifest, artifact=artifact
    )
    try:
        write_atomic(path, content, mode=0o600)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error
    return {
        "file": os.fspath(path),
        "bytes": len(content),
        "version": classifier.head.version,
        "taught": list(classifier.taught),
    }


def _short(row: np.ndarray) -> list[float]:
    """Exactly these float32 numbers, in nine digits: a message has room for more of them."""
    return [float(f"{x:.9g}") for x in row]
