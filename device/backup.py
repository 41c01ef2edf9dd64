"""Learned state in one file, to be kept elsewhere and put back: `fieldvit-device learned export` and `import`.

    fieldvit-learned 1            a line
    {"site": ..., "device": ...}  a line of JSON: whose it is, and on which backbone and head it was learned
    ...                           the state as it lies on the board, an .npz without pickle
    SHA-256                       32 bytes, over everything before

The hash protects against damage, not against a forger: whoever may import may teach as well. What is put back is bound to
the same site and device, backbone and head, has to be sound, and passes the guard that every lesson passes.
"""

import hashlib
import json
from pathlib import Path

from device.classifier import Classifier, Head
from device.contract.errors import ArtifactError, LearningError
from device.contract.manifest import Artifact, LearningSpec, Manifest
from device.contract.record import record
from device.contract.records import from_table, to_table
from device.contract.topics import DeviceId
from device.history import MAX_BYTES
from device.learned import HEAD_NAME, LearnedState, encode_state, read_state
from device.learning import guard
from device.learning.guard import Examples

MAGIC = b"fieldvit-learned 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_EXTRA_BYTES = 1 << 20
"""Header, labels, ids and what an .npz adds."""
_LONGEST_LESSON = 1000


@record(frozen=True, slots=True, kw_only=True)
class Backup:
    """What the header of a backup says; `base_head` is the SHA-256 of the bundle's head.npz."""

    site: str
    device: str
    backbone: str
    base_head: str
    model: str
    version: int
    labels: tuple[str, ...]


def write_backup(head: Head, base: Head, *, device: DeviceId, manifest: Manifest, artifact: Artifact) -> bytes:
    """The file of a head that this device has learned on this model."""
    base_head = manifest.files[HEAD_NAME].sha256
    header = Backup(
        site=device.site,
        device=device.device,
        backbone=artifact.backbone,
        base_head=base_head,
        model=f"{manifest.name} {manifest.version} {artifact.precision}",
        version=head.version,
        labels=head.labels,
    )
    state = encode_state(head.state(base), base_head)
    content = MAGIC + json.dumps(to_table(header), ensure_ascii=False).encode() + b"\n" + state
    return content + hashlib.sha256(content).digest()


def require_backup(content: bytes, name: Path) -> None:
    """ArtifactError where a file begins otherwise; the first bytes tell, so that a large mistake is not read whole."""
    if not content.startswith(MAGIC):
        raise ArtifactError(f"{name}: is no backup of learned state; 'fieldvit-device learned export' writes one")


def read_backup(content: bytes, name: Path) -> tuple[Backup, LearnedState]:
    """Check a file and read it.

    Raises:
        ArtifactError: it is no backup, or not a whole one.
    """
    require_backup(content, name)
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ArtifactError(f"{name}: is damaged, its SHA-256 differs; copy it again")
    line, _, state = body[len(MAGIC) :].partition(b"\n")
    try:
        table = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name}: its header is not JSON ({error}); export it again") from error
    header = from_table(Backup, table, where=str(name), error=ArtifactError)
    learned, base_head = read_state(state, name)
    if (learned.version, learned.labels, base_head) != (header.version, header.labels, header.base_head):
        raise ArtifactError(f"{name}: its header and its state disagree; export it again")
    return header, learned


def max_backup_bytes(spec: LearningSpec) -> int:
    """The largest backup of a model that a board takes: twice the statistics, the kept examples, and the lessons."""
    statistics = 8 * (spec.feature_dim**2 + spec.max_classes * (spec.feature_dim + 1))
    kept = spec.max_classes * guard.KEPT_PER_CLASS * (4 * spec.feature_dim + 8)
    lessons = MAX_BYTES + _LONGEST_LESSON * 4 * spec.feature_dim
    return 2 * (statistics + kept) + lessons + _EXTRA_BYTES


def head_of_backup(
    content: bytes, name: Path, classifier: Classifier, *, device: DeviceId, manifest: Manifest, artifact: Artifact
) -> Head:
    """The head in a backup, checked as a lesson is; nothing is committed.

    Raises:
        ArtifactError: it is damaged or too large.
        LearningError: it is another device's, or of another model or of other labels.
        GuardError: it would do harm.
    """
    largest = max_backup_bytes(manifest.learning)
    if len(content) > largest:
        raise ArtifactError(f"{name}: {len(content)} bytes; a backup for {manifest.name} has up to {largest}")
    header, state = read_backup(content, name)
    if (header.site, header.device) != (device.site, device.device):
        raise LearningError(f"{name}: was learned by {header.site}/{header.device}, this is {device}; import it there")
    if header.backbone != artifact.backbone:
        raise LearningError(
            f"{name}: was learned on backbone {header.backbone[:12]} ({header.model}), "
            f"this board serves {artifact.backbone[:12]}; install that model first"
        )
    if header.base_head != manifest.files[HEAD_NAME].sha256:
        raise LearningError(
            f"{name}: was learned on the head of {header.model}, this bundle ships another; install that first"
        )
    try:
        head = classifier.restored(state)
    except (ValueError, KeyError) as error:
        raise LearningError(f"{name}: {error}") from error
    if len(head.labels) > manifest.learning.max_classes:
        raise LearningError(
            f"{name}: has {len(head.labels)} classes, this model may learn {manifest.learning.max_classes}"
        )
    _require_harmless(head, classifier)
    return head


def _require_harmless(head: Head, classifier: Classifier) -> None:
    base = classifier.base
    guard.check(
        classifier.base_head,
        classifier.base_head,
        head,
        guard_features=base.guard_features,
        guard_labels=base.guard_labels,
        new_features=head.kept.features,
        new_labels=head.kept.labels,
        max_drop=classifier.max_drop,
    )
    guard.check_taught(head.learner, head.kept, Examples.none(head.learner.feature_dim))
