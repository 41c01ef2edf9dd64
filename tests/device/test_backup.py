"""A backup of learned state comes back bit for bit, or is refused by a reason with the state untouched."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.backup import MAGIC, head_of_backup, max_backup_bytes, read_backup, write_backup
from device.classifier import Classifier, Head
from device.contract.errors import ArtifactError, DeviceError, GuardError, LearningError
from device.contract.topics import DeviceId
from tests.device.test_migration import Site, with_head
from tests.device.test_undo import facts
from tests.support.tiny_bundle import LABELS, NEW_LABEL, TinyModel

DEVICE = DeviceId("lab", "cam-1")
NAME = Path("backup")
LESSONS = st.lists(st.sampled_from([0, 2, 4]), min_size=1, max_size=4)


@pytest.fixture
def site(tmp_path: Path, tiny_model: TinyModel) -> Site:
    return Site(tmp_path, tiny_model)


def export(site: Site, head: Head | None = None, device: DeviceId = DEVICE) -> bytes:
    model = site.serving.model
    classifier = model.classifier
    return write_backup(
        head or classifier.head, classifier.base_head, device=device, manifest=model.manifest, artifact=model.artifact
    )


def read(site: Site, content: bytes, device: DeviceId = DEVICE) -> Head:
    model = site.serving.model
    return head_of_backup(
        content, NAME, model.classifier, device=device, manifest=model.manifest, artifact=model.artifact
    )


def restore(site: Site, content: bytes) -> Head:
    classifier = site.classifier
    return classifier.restore(read(site, content), before=classifier.head, is_served=lambda: True)


def all_facts(classifier: Classifier) -> dict[str, object]:
    """Everything that is stored, the version apart."""
    head = classifier.head
    start = facts(head.start) if head.start and head.history else None
    lessons = [(lesson.id, lesson.label, lesson.features.tobytes()) for lesson in head.history]
    return {**facts(head), "lessons": head.lessons, "history": lessons, "start": start}


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LESSONS)
def test_export_then_import_is_the_identity(site: Site, classes: list[int]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("device.history.MAX_LESSONS", 2)
        while site.classifier.head.history:
            site.classifier.undo()
        for number, class_index in enumerate(classes):
            site.teach(class_index, seed=number, lesson=f"l{number}")
    content, before = export(site), all_facts(site.classifier)
    site.teach(4, seed=99)
    version = site.classifier.head.version
    restore(site, content)
    assert all_facts(site.classifier) == before == all_facts(site.restarted().classifier)
    assert site.classifier.head.version == version + 1  # a number names one state only
    assert export(site) == export(site)


def test_a_board_that_lost_everything_gets_its_version_back(site: Site, tmp_path: Path, tiny_model: TinyModel):
    for seed in (1, 2):
        site.teach(4, seed=seed)
    content = export(site)
    (tmp_path / "new").mkdir()
    fresh = Site(tmp_path / "new", tiny_model)
    assert restore(fresh, content).version == 2
    assert fresh.answers(4) == {NEW_LABEL}
    fresh.classifier.undo()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_or_lost_byte_is_refused(site: Site, data):
    if not site.classifier.taught:
        site.teach(4)
    content = export(site)
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (bytes(flipped), content[:position], content + b"\0"):
        with pytest.raises(ArtifactError, match="backup"):
            read(site, damaged)


def test_every_byte_is_covered(site: Site):
    """Not a sample: each byte of a real backup, flipped, is refused."""
    site.teach(4)
    content = export(site)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        with pytest.raises(ArtifactError):
            read_backup(bytes(flipped), NAME)


def resealed(content: bytes, **changes: object) -> bytes:
    """A backup with another header whose hash is right: built wrongly, not damaged."""
    line, _, rest = content[len(MAGIC) : -32].partition(b"\n")
    body = MAGIC + json.dumps(json.loads(line) | changes).encode() + b"\n" + rest
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cam-2"}, r"was learned by lab/cam-2, this is lab/cam-1"),
        ({"site": "other"}, r"was learned by other/cam-1"),
        ({"backbone": "f" * 64}, r"was learned on backbone ffffffffffff .*install that model first"),
        ({"base_head": "f" * 64}, "header and its state disagree"),
        ({"version": 7}, "header and its state disagree"),
        ({"labels": ["a"]}, "header and its state disagree"),
        ({"wings": 2}, "unknown key 'wings'"),
        ({"version": "7"}, "version: expected int"),
    ],
)
def test_what_is_not_of_this_board_is_refused_by_name(site: Site, changes: dict[str, object], message: str):
    site.teach(4)
    before = site.classifier.head
    with pytest.raises(DeviceError, match=message):
        read(site, resealed(export(site), **changes))
    assert site.classifier.head is before


def test_another_bundle_is_refused_by_name(site: Site, tiny_model: TinyModel):
    site.teach(4)
    content = export(site)
    site.activate(2, tiny_model, files=with_head(tiny_model, counts=lambda array: array + 1))
    with pytest.raises(LearningError, match="this bundle ships another"):
        read(site, content)


def test_other_labels_are_refused(site: Site):
    site.teach(4)
    head = site.classifier.head
    for labels, message in (
        (("x", *head.labels[1:]), "its labels are not this bundle's"),
        ((*LABELS, LABELS[0]), "two of its labels are the same"),
    ):
        with pytest.raises(LearningError, match=message):
            read(site, export(site, replace(head, labels=labels)))


def test_what_is_too_large_is_refused_before_it_is_read(site: Site):
    largest = max_backup_bytes(site.serving.model.manifest.learning)
    with pytest.raises(ArtifactError, match=f"a backup for tiny has up to {largest}"):
        read(site, bytes(largest + 1))


def test_the_largest_honest_backup_is_not_too_large(site: Site):
    for number in range(25):
        site.teach(4, count=40, seed=number)
    assert len(export(site)) < max_backup_bytes(site.serving.model.manifest.learning)


def test_a_backup_that_would_do_harm_is_refused(site: Site):
    site.teach(4)
    head = site.classifier.head
    learner = head.learner.without(np.zeros((0, 16), np.float32), np.zeros(0, int))
    learner.sums[[0, 1]] = learner.sums[[1, 0]]  # two shipped classes change places
    before = site.classifier.head
    with pytest.raises(GuardError, match="old classes would fall"):
        read(site, export(site, replace(head, learner=learner)))
    assert site.classifier.head is before


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\3\4" + bytes(100), MAGIC])
def test_what_is_no_backup_is_said_to_be_none(content: bytes):
    with pytest.raises(ArtifactError, match=r"is no backup of learned state|is damaged"):
        read_backup(content, NAME)


def test_what_was_taught_in_between_is_not_overwritten(site: Site):
    site.teach(4)
    head, before = read(site, export(site)), site.classifier.head
    site.teach(4, seed=7)
    with pytest.raises(LearningError, match="taught in between"):
        site.classifier.restore(head, before=before, is_served=lambda: True)
    assert site.classifier.head.version == 2
