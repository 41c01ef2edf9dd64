"""Learning on the board is a transaction: committed whole and kept over restarts, or not at all."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import device.learned
from device.classifier import Classifier, read_base_head
from device.contract.bundle import extract
from device.contract.errors import ArtifactError, GuardError, LearningError
from device.engine import Engine
from device.golden import check_golden
from device.learned import LearnedState, LearnedStore, remove_stale
from device.preprocess import preprocess
from device.ring import MAX_BYTES, FeatureRing
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
    assert (other.head.version, other.problems) == (0, [])
    assert board.classifier("h1").head.version == 1  # it is still there, should the board go back


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


def test_a_taught_class_cannot_be_taken_over_by_a_mislabelled_lesson(board: Board):
    classifier = board.classifier()
    classifier.learn(board.features(4, count=20), NEW_LABEL)
    stolen = board.features(4, count=60, seed=7)
    for again in (classifier, board.classifier()):  # also after a restart
        with pytest.raises(GuardError, match=r"class .[a-z]+., taught before"):
            again.learn(stolen, "other")
        assert again.head.version == 1
        assert {again.classify(features).label for features in board.features(4, seed=8)} == {NEW_LABEL}


def test_many_harmful_lessons_never_cost_more_than_the_bound(board: Board):
    classifier, rng = board.classifier(), np.random.default_rng(0)
    base, pools = classifier.base, [board.features(k, count=60, seed=3) for k in range(4)]
    refused = 0
    for _ in range(60):
        features = pools[rng.integers(4)][rng.integers(0, 60, rng.integers(1, 12))]
        try:
            classifier.learn(features, (*LABELS, "junk")[rng.integers(5)])
        except LearningError:
            refused += 1
    answers = (base.guard_features @ classifier.head.weight + classifier.head.bias).argmax(axis=1)
    right = (base.learner.logits(base.guard_features).argmax(axis=1) == base.guard_labels).mean()
    assert (answers == base.guard_labels).mean() >= right - board.manifest.learning.max_drop - 1e-9
    assert refused


def test_a_lesson_that_comes_twice_is_learned_once_also_after_a_restart(board: Board):
    classifier = board.classifier()
    assert not classifier.has_learned("c1")
    classifier.learn(board.features(4), NEW_LABEL, lesson="c1")
    again = board.classifier()
    assert again.has_learned("c1")
    assert again.learn(board.features(4), NEW_LABEL, lesson="c1").version == 1
    assert again.head.learner.counts[4] == 10


def test_a_model_that_was_replaced_meanwhile_learns_nothing(board: Board):
    classifier = board.classifier()
    with pytest.raises(LearningError, match="the model was replaced"):
        classifier.learn(board.features(4), NEW_LABEL, is_served=lambda: False)
    assert classifier.head.version == board.classifier().head.version == 0


def test_a_disk_that_takes_nothing_is_a_learning_error(board: Board):
    (board.directory / "state").write_text("in the way")
    classifier = board.classifier()
    with pytest.raises(LearningError, match=r"cannot be written .* nothing was learned"):
        classifier.learn(board.features(4), NEW_LABEL)
    assert classifier.head.version == 0


def store_and_state(directory: Path) -> tuple[LearnedStore, Callable[[int], LearnedState]]:
    return LearnedStore(directory, "b", "h"), lambda version: LearnedState(
        labels=("x",), version=version, arrays={"a": np.arange(3.0)}
    )


class PowerCutError(BaseException):
    pass


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("name", ["os.replace", "device.learned.write_atomic", "device.learned.sync_directory"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_power_cut_in_a_save_leaves_a_sound_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool, name: str, calls: int
):
    store, state = store_and_state(tmp_path)
    store.save(state(1))
    store.save(state(2))
    if is_damaged:
        store.path.write_bytes(store.path.read_bytes()[:-50])
    module = __import__("os") if name == "os.replace" else device.learned
    original, left = getattr(module, name.rpartition(".")[2]), [calls]

    def cut(*arguments: object) -> None:
        if not left[0]:
            raise PowerCutError
        left[0] -= 1
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name.rpartition(".")[2], cut)
        with contextlib.suppress(PowerCutError):
            store.save(state(3))
    assert store.load().version in ((1, 3) if is_damaged else (2, 3))


def test_states_of_backbones_in_no_slot_are_removed(board: Board):
    head = board.manifest.files["head.npz"].sha256
    for _ in range(2):
        board.classifier(head).learn(board.features(4), NEW_LABEL)
    state = board.directory / "state"
    own = {path.name for path in state.iterdir()}
    for name in ("old.npz", "old.npz.prev", "older.npz.tmp"):
        (state / name).write_bytes(b"x")
    remove_stale(state, [board.slot, board.directory / "missing"])
    assert {path.name for path in state.iterdir()} == own
    (state / "old.npz").write_bytes(b"x")
    (board.slot / "manifest.json").write_bytes(b"damaged")
    remove_stale(state, [board.slot])
    assert (state / "old.npz").exists()  # whose state it is cannot be told


def test_a_ring_that_asks_for_too_much_memory_is_bounded(caplog: pytest.LogCaptureFixture):
    ring = FeatureRing(10**9, 384)
    assert ring._rows.nbytes <= MAX_BYTES
    assert "too much memory" in caplog.text
