"""Learning on the board is a transaction: committed whole and kept over restarts, or not at all."""

from pathlib import Path

import numpy as np
import pytest

from device.classifier import Classifier, read_base_head
from device.contract.bundle import extract
from device.contract.errors import ArtifactError, GuardError, LearningError
from device.engine import Engine
from device.golden import check_golden
from device.learned import LearnedStore
from device.preprocess import preprocess
from device.ring import FeatureRing
from tests.support.tiny_bundle import LABELS, NEW_LABEL, SPEC, TinyModel, make_frames, write_bundle, wrong_golden


class Board:
    """An extracted bundle and its state directory."""

    def __init__(self, directory: Path, model: TinyModel, **files: bytes) -> None:
        self.slot, self.directory = directory / "slot", directory
        self.manifest = extract(write_bundle(directory, model, files=files), self.slot)
        self.artifact = self.manifest.artifact("int8")
        self.engine = Engine(self.slot / self.artifact.path)

    def classifier(self, head: str = "h1") -> Classifier:
        base = read_base_head(self.slot, self.manifest, self.artifact)
        return Classifier(base, self.manifest, LearnedStore(self.directory / "state", self.artifact.backbone, head))

    def features(self, class_index: int, count: int = 10, seed: int = 5) -> np.ndarray:
        frames = make_frames(count, class_index, seed=seed)
        return np.stack([self.engine.features(preprocess(frame[None], SPEC)) for frame in frames])

    def state_file(self) -> Path:
        (path,) = (self.directory / "state").glob("*.npz")
        return path


@pytest.fixture
def board(tmp_path: Path, tiny_model: TinyModel) -> Board:
    return Board(tmp_path, tiny_model)


def test_base_classes_are_answered(board: Board):
    classifier = board.classifier()
    for class_index, label in enumerate(LABELS):
        answers = [classifier.classify(features) for features in board.features(class_index)]
        assert {answer.label for answer in answers} == {label}
        assert all(
            abs(answer.scores.sum() - 1) < 1e-5 and answer.scores.max() == pytest.approx(answer.confidence)
            for answer in answers
        )


def test_a_new_class_is_learned_and_survives_a_restart(board: Board):
    classifier = board.classifier()
    head = classifier.learn(board.features(4), NEW_LABEL)
    assert (head.version, head.labels) == (1, (*LABELS, NEW_LABEL))
    again = board.classifier()
    assert again.head.version == 1
    assert {again.classify(features).label for features in board.features(4, seed=8)} == {NEW_LABEL}
    for class_index, label in enumerate(LABELS):
        assert {again.classify(features).label for features in board.features(class_index)} == {label}


def test_harm_to_the_old_classes_is_refused_and_changes_nothing(board: Board):
    classifier = board.classifier()
    before, stolen = classifier.head, board.features(0, count=60)
    with pytest.raises(GuardError):
        classifier.learn(stolen, NEW_LABEL)
    assert classifier.head is before
    assert not (board.directory / "state").exists()


@pytest.mark.parametrize("label", ["", " x", "a\nb", "x" * 65, "\ud800"])
def test_unusable_labels_are_refused(board: Board, label: str):
    with pytest.raises(LearningError, match="printable"):
        board.classifier().learn(board.features(4), label)


@pytest.mark.parametrize(
    "features", [np.zeros((1, 15)), np.zeros(16), np.zeros((0, 16)), np.full((2, 16), np.nan), np.zeros((1001, 16))]
)
def test_unusable_features_are_refused(board: Board, features: np.ndarray):
    with pytest.raises(LearningError, match="features must be"):
        board.classifier().learn(features, NEW_LABEL)


def test_classes_are_bounded(board: Board):
    classifier = board.classifier()
    rng = np.random.default_rng(0)
    center = board.features(4).mean(axis=0)
    for number in range(4):
        direction = rng.normal(size=16)
        classifier.learn(center + direction + 0.001 * rng.normal(size=(20, 16)), f"extra-{number}")
    with pytest.raises(LearningError, match="may learn 8"):
        classifier.learn(board.features(4), "one too many")


def test_any_damage_to_the_state_falls_back_to_the_version_before(board: Board):
    classifier = board.classifier()
    classifier.learn(board.features(4), NEW_LABEL)
    classifier.learn(board.features(4, seed=6), NEW_LABEL)
    content, rng = board.state_file().read_bytes(), np.random.default_rng(0)
    for position in rng.integers(0, len(content), 60):
        damaged = (
            content[:position] + bytes([content[position] ^ (1 << int(rng.integers(8)))]) + content[position + 1 :]
        )
        board.state_file().write_bytes(damaged)
        again = board.classifier()
        if again.head.version == 2:  # the bit was one that a zip does not need
            np.testing.assert_array_equal(again.head.weight, classifier.head.weight)
        else:
            assert again.head.version == 1
            assert "learned state not used" in again.problems[0]
    for size in range(0, len(content), 500):
        board.state_file().write_bytes(content[:size])
        assert board.classifier().head.version == 1


def test_two_damaged_versions_leave_the_bundles_head(board: Board):
    classifier = board.classifier()
    for seed in (5, 6):
        classifier.learn(board.features(4, seed=seed), NEW_LABEL)
    for path in (board.directory / "state").iterdir():
        path.write_bytes(b"gone")
    again = board.classifier()
    assert (again.head.version, again.head.labels) == (0, LABELS)
    assert len(again.problems) == 2


def test_state_of_another_head_or_backbone_is_not_loaded(board: Board):
    board.classifier("h1").learn(board.features(4), NEW_LABEL)
    other = board.classifier("h2")
    assert other.head.version == 0
    assert "another head" in other.problems[0]


def test_golden_outputs_prove_the_model(board: Board, tmp_path: Path, tiny_model: TinyModel):
    base = board.classifier().base.learner
    assert check_golden(board.engine, board.slot, SPEC, board.artifact, base) < 1e-4
    (tmp_path / "other").mkdir()
    other = Board(tmp_path / "other", tiny_model, **wrong_golden(tiny_model))
    with pytest.raises(ArtifactError, match="golden features differ by"):
        check_golden(other.engine, other.slot, SPEC, other.artifact, base)


def test_ring_keeps_the_last_frames_and_names_the_missing():
    ring = FeatureRing(3, 2)
    for number in range(5):
        ring.add(str(number), np.full(2, number, np.float32))
    ring.add("3", np.full(2, 33, np.float32))
    np.testing.assert_array_equal(ring.get(["2", "3", "4"])[:, 0], [2, 33, 4])
    with pytest.raises(LearningError, match="'1' is not among the last 3 frames"):
        ring.get(["2", "1"])
    ring.add("5", np.zeros(2, np.float32))
    with pytest.raises(LearningError):
        ring.get(["2"])
