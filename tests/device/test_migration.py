"""What was learned moves to another backbone: exactly where it can, judged by the guard, and never half."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import device.history
import device.learned
from device.classifier import Head
from device.contract.board import load_board
from device.contract.bundle import extract
from device.contract.errors import ArtifactError, LearningError, UpdateRefusedError
from device.contract.manifest import ProjectorEntry
from device.learning.projector import Projector
from device.learning.slda import SLDA
from device.migration import read_projector
from device.preprocess import preprocess
from device.serving import Model, Serving
from device.slots import Slots
from tests.support.tiny_bundle import (
    LABELS,
    NEW_LABEL,
    SPEC,
    TinyModel,
    make_frames,
    npz,
    with_projector,
    write_bundle,
)

RUNTIME = load_board("generic-x86-64").runtime
Way = tuple[ProjectorEntry, bytes]


class Site:
    """A data directory and a server of models, without an agent."""

    def __init__(self, directory: Path, model: TinyModel) -> None:
        self.directory, self.model = directory, model
        (directory / "root").mkdir()
        self.slots = Slots(directory / "root")
        self.serving = Serving(self.slots, RUNTIME)
        self.activate(1, model)
        self.serving.confirm()

    def activate(self, release: int, model: TinyModel, *, accept_loss: bool = False, **changes: object):
        bundle = write_bundle(self.directory, model, release=release, **changes)
        entry = self.slots.stage(f"hash-{release}", lambda directory: extract(bundle, directory))
        return self.serving.activate(entry.slot, "int8", accept_loss=accept_loss)

    def teach(self, class_index: int, *, count: int = 10, seed: int = 5, lesson: str = "") -> Head:
        label = [*LABELS, NEW_LABEL][class_index]
        return self.classifier.learn(self.features(class_index, count, seed), label, lesson=lesson)

    def features(self, class_index: int, count: int, seed: int) -> np.ndarray:
        frames = make_frames(count, class_index, seed=seed)
        return np.stack([self.serving.model.engine.features(preprocess(frame[None], SPEC)) for frame in frames])

    def answers(self, class_index: int, seed: int = 8) -> set[str]:
        return {self.serving.model.infer(frame)[1].label for frame in make_frames(20, class_index, seed=seed)}

    def restarted(self) -> Model:
        serving = Serving(Slots(self.directory / "root"), RUNTIME)
        serving.start()
        return serving.model

    @property
    def classifier(self):
        return self.serving.model.classifier

    @property
    def release(self) -> int:
        return self.serving.model.manifest.release

    @property
    def states(self) -> list[str]:
        return sorted(path.suffix for path in (self.directory / "root" / "state").iterdir())


@pytest.fixture
def site(tmp_path: Path, tiny_model: TinyModel) -> Site:
    return Site(tmp_path, tiny_model)


# the algebra

K, D, E = 3, 4, 5
small = st.integers(-50, 50).map(float)


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(3, 10, (count, D)).astype(np.float32), rng.integers(0, K, count)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_mapped_statistics_are_the_statistics_of_mapped_features(seed: int, count: int):
    rng = np.random.default_rng(seed)
    features, labels = draw(rng, count)
    weight, bias = rng.normal(size=(D, E)), rng.normal(size=E)
    old, new = SLDA(K, D, shrinkage=0.1), SLDA(K, E, shrinkage=0.1)
    old.update(features, labels)
    new.update(features.astype(np.float64) @ weight + bias, labels)
    mapped = Projector(weight, bias, np.zeros((E, E))).statistics(old.state())
    for name, array in new.state().items():
        np.testing.assert_allclose(mapped[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_unexplained_rest_widens_every_sample_alike():
    rng = np.random.default_rng(0)
    features, labels = draw(rng, 40)
    root = rng.normal(size=(E, E))
    weight, bias, rest = rng.normal(size=(D, E)), rng.normal(size=E), root @ root.T
    old, with_rest = SLDA(K, D, shrinkage=0.1), SLDA(K, E, shrinkage=0.1)
    old.update(features, labels)
    with_rest.restore(Projector(weight, bias, rest).statistics(old.state()))
    expected = weight.T @ old.covariance() @ weight + rest
    np.testing.assert_allclose(with_rest.covariance(), expected, rtol=1e-6, atol=1e-6)


def test_draws_of_the_rest_have_its_covariance():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(E, E))
    projector = Projector(np.zeros((D, E)), np.arange(E, dtype=float), root @ root.T)
    drawn = projector.with_rest(np.zeros((10, D), np.float32), times=2000, rng=rng)
    np.testing.assert_allclose(drawn.mean(axis=0), np.arange(E), atol=0.1)
    np.testing.assert_allclose(np.cov(drawn.T), root @ root.T, rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    "arrays",
    [
        (np.zeros((D, E)), np.zeros(D), np.zeros((E, E))),
        (np.zeros((D, E)), np.zeros(E), np.zeros((D, E))),
        (np.full((D, E), np.nan), np.zeros(E), np.zeros((E, E))),
        (np.zeros(D), np.zeros(E), np.zeros((E, E))),
    ],
)
def test_a_projector_that_is_none_is_refused(arrays):
    with pytest.raises(LearningError, match="projector"):
        Projector(*arrays)


# models that take over


@pytest.mark.parametrize("kept_lessons", [0, 20])
def test_a_taught_class_moves_to_another_backbone(
    site: Site, other_model: TinyModel, projector: Way, kept_lessons: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device.history, "MAX_LESSONS", kept_lessons)
    for number in range(3):
        site.teach(4, seed=number, lesson=f"l{number}")
    site.teach(0, seed=9, lesson="known")
    old = site.classifier.head
    migration = site.activate(2, other_model, **with_projector(*projector))
    assert migration.fate.migrated == (LABELS[0], NEW_LABEL)
    head = site.classifier.head
    assert (head.labels, head.version) == ((*LABELS, NEW_LABEL), old.version + 1)
    assert site.answers(4) == {NEW_LABEL}
    assert all(site.answers(k) == {label} for k, label in enumerate(LABELS))
    assert site.classifier.has_learned("known")
    assert [lesson.id for lesson in head.history] == (["l0", "l1", "l2", "known"] if kept_lessons else [])
    again = site.restarted().classifier.head
    assert (again.version, again.labels) == (head.version, head.labels)
    np.testing.assert_array_equal(again.weight, head.weight)


def test_moving_sums_equals_learning_mapped_features(
    tmp_path: Path, tiny_model: TinyModel, other_model: TinyModel, projector: Way, monkeypatch: pytest.MonkeyPatch
):
    """Lessons that are forgotten but for their sums give the head that the same lessons give as mapped features."""
    heads = []
    for number, kept_lessons in enumerate((20, 1)):
        monkeypatch.setattr(device.history, "MAX_LESSONS", kept_lessons)
        (tmp_path / str(number)).mkdir()
        site = Site(tmp_path / str(number), tiny_model)
        for seed, class_index in enumerate((4, 1, 4)):
            site.teach(class_index, seed=seed)
        site.activate(2, other_model, **with_projector(*projector))
        heads.append(site.classifier.head.learner.state())
    for name, array in heads[0].items():
        np.testing.assert_allclose(heads[1][name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def read_npz(content: bytes, directory: Path) -> dict[str, np.ndarray]:
    path = directory / "read.npz"
    path.write_bytes(content)
    with np.load(path) as arrays:
        return dict(arrays)


def test_a_moved_lesson_can_be_taken_back(site: Site, other_model: TinyModel, projector: Way):
    site.teach(4, lesson="center")
    site.teach(1, seed=2, lesson="known")
    site.activate(2, other_model, **with_projector(*projector))
    site.classifier.undo("center")
    assert site.classifier.head.labels == LABELS
    assert site.restarted().classifier.taught == (LABELS[1],)


def test_more_is_taught_on_what_moved(site: Site, other_model: TinyModel, projector: Way):
    site.teach(4)
    site.activate(2, other_model, **with_projector(*projector))
    head = site.teach(4, seed=3)
    assert site.restarted().classifier.head.version == head.version
    assert ".staged" not in site.states


def test_without_a_way_the_class_is_named_and_nothing_is_touched(site: Site, other_model: TinyModel):
    site.teach(4)
    before = site.classifier.head
    with pytest.raises(UpdateRefusedError, match=r"tiny 2\.0\.0 would drop 'center'.*--accept-loss") as refused:
        site.activate(2, other_model)
    assert refused.value.reason == "learned-loss"
    assert (site.release, site.classifier.head) == (1, before)
    assert [site.slots.state(slot).state for slot in "ab"] == ["confirmed", "empty"]
    assert site.slots.rejection("hash-2") is None
    assert site.activate(2, other_model, accept_loss=True).fate.dropped == (NEW_LABEL,)
    assert site.classifier.head.labels == LABELS


def test_what_moved_is_kept_by_the_next_release_of_that_backbone(site: Site, other_model: TinyModel, projector: Way):
    """Nothing was taught since, so the moved state is still the staged file."""
    site.teach(4)
    site.activate(2, other_model, **with_projector(*projector))
    site.serving.confirm()
    version = site.classifier.head.version
    assert site.activate(3, other_model).fate.kept == (NEW_LABEL,)
    assert (site.classifier.head.version, site.answers(4)) == (version, {NEW_LABEL})
    assert site.restarted().classifier.head.version == version


def test_a_lesson_between_loading_and_serving_is_not_lost(
    site: Site, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    load = Model.load

    def load_and_teach(*arguments: object) -> Model:
        model = load(*arguments)
        site.teach(4)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(Model, "load", load_and_teach)
        site.activate(2, tiny_model)
    assert site.classifier.head.labels == (*LABELS, NEW_LABEL)


@pytest.mark.parametrize("is_undone", [True, False])
def test_what_was_taken_back_does_not_return_with_its_backbone(
    site: Site, tiny_model: TinyModel, other_model: TinyModel, projector: Way, is_undone: bool
):
    """The backbone before comes again in a new release; its old state still lies there."""
    version = site.teach(4, lesson="wrong").version
    site.activate(2, other_model, accept_loss=True, **(with_projector(*projector) if is_undone else {}))
    if is_undone:
        site.classifier.undo("wrong")
    site.serving.confirm()
    site.activate(3, tiny_model)
    assert site.classifier.taught == ()
    assert site.restarted().classifier.taught == ()
    site.serving.confirm()
    assert site.teach(4).version > version
    assert site.restarted().classifier.taught == (NEW_LABEL,)


def test_going_back_by_hand_still_finds_the_old_state(site: Site, other_model: TinyModel):
    before = site.teach(4)
    site.activate(2, other_model, accept_loss=True)
    site.serving.confirm()
    site.serving.rollback()
    assert (site.classifier.taught, site.classifier.head.version) == ((NEW_LABEL,), before.version)


def test_a_board_without_a_model_finds_its_state_again(site: Site, other_model: TinyModel, projector: Way):
    """Both slots are damaged: the same bundle comes again, and what had moved to it is there."""
    site.teach(4)
    site.activate(2, other_model, **with_projector(*projector))
    site.serving.confirm()
    for slot in "ab":
        site.slots.reject(slot, "load")
    site.serving = Serving(site.slots, RUNTIME)
    site.activate(3, other_model)
    assert site.classifier.taught == (NEW_LABEL,)


def test_states_of_heads_in_no_slot_are_removed(site: Site, tiny_model: TinyModel):
    site.teach(4)
    for release, share in ((2, 2), (3, 4)):
        changes = {name: lambda a, s=share: a // s if a.dtype.kind == "i" else a / s for name in HALF}
        site.activate(release, tiny_model, files=with_head(tiny_model, **changes))
        site.serving.confirm()
    assert site.states == [".npz", ".staged", ".staged"]
    root = site.directory / "root"
    device.learned.remove_stale(root / "state", [root / "slots" / slot for slot in "ab"])
    assert site.states == [".staged", ".staged"]
    assert site.restarted().classifier.taught == (NEW_LABEL,)


def test_going_back_brings_the_old_state_back(site: Site, other_model: TinyModel, projector: Way):
    before = site.teach(4)
    site.activate(2, other_model, **with_projector(*projector))
    site.teach(4, seed=3)
    site.serving.revert(site.serving.model, "engine", "it failed")
    assert (site.release, site.classifier.head.version) == (1, before.version)
    again = site.restarted()
    assert (again.manifest.release, again.classifier.head.version) == (1, before.version)


def test_what_a_failed_install_left_is_not_used_later(
    site: Site, other_model: TinyModel, projector: Way, monkeypatch: pytest.MonkeyPatch
):
    """The power goes after the state was written and before the journal said that it serves; then the lesson goes."""
    site.teach(4, lesson="wrong")
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "begin_testing", lambda *_: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(UpdateRefusedError, match="journal"):
            site.activate(2, other_model, **with_projector(*projector))
    assert ".staged" in site.states
    assert site.restarted().classifier.head.labels == (*LABELS, NEW_LABEL)
    site.slots.recover(is_start=False)
    site.classifier.undo("wrong")
    site.activate(2, other_model, **with_projector(*projector))
    assert site.classifier.head.labels == site.restarted().classifier.head.labels == LABELS


def test_a_full_disk_refuses_the_update(
    site: Site, other_model: TinyModel, projector: Way, monkeypatch: pytest.MonkeyPatch
):
    site.teach(4)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(device.learned, "write_atomic", fail)
    with pytest.raises(UpdateRefusedError, match="No space left") as refused:
        site.activate(2, other_model, **with_projector(*projector))
    assert (refused.value.reason, site.release) == ("disk", 1)


# another head for the same backbone


def with_head(model: TinyModel, **changes: Callable[[np.ndarray], np.ndarray]) -> dict[str, bytes]:
    """The same bundle with other numbers in its head."""
    head = {
        name: changes.get(name.rpartition("/")[2], lambda array: array)(array) for name, array in model.head.items()
    }
    return {"head.npz": npz(head)}


HALF = {"counts": lambda a: a // 2, "sums": lambda a: a / 2, "gram": lambda a: a / 2}


def test_another_head_for_the_same_backbone_takes_what_was_taught(site: Site, tiny_model: TinyModel):
    site.teach(4)
    migration = site.activate(2, tiny_model, files=with_head(tiny_model, **HALF))
    assert migration.fate.migrated == (NEW_LABEL,)
    assert site.answers(4) == {NEW_LABEL}
    np.testing.assert_array_equal(site.classifier.head.learner.counts, [10, 10, 10, 10, 10])


def test_the_same_head_keeps_its_file(site: Site, tiny_model: TinyModel):
    version = site.teach(4).version
    assert site.activate(2, tiny_model).fate.kept == (NEW_LABEL,)
    assert site.classifier.head.version == version


def test_both_heads_of_a_backbone_keep_their_own_state(site: Site, tiny_model: TinyModel):
    version = site.teach(4).version
    site.activate(2, tiny_model, files=with_head(tiny_model, **HALF))
    site.serving.confirm()
    for seed in (2, 3):
        site.teach(4, seed=seed)
    site.serving.rollback()
    assert (site.release, site.classifier.head.version) == (1, version)


@pytest.mark.parametrize("kept_lessons", [0, 20])
def test_what_a_new_head_ships_is_not_counted_twice(
    site: Site, tiny_model: TinyModel, kept_lessons: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device.history, "MAX_LESSONS", kept_lessons)
    site.teach(4)
    site.teach(2, seed=3)
    migration = site.activate(2, tiny_model, files=with_head(tiny_model, **HALF))
    assert (migration.fate.shipped, migration.fate.migrated) == ((LABELS[2],), (NEW_LABEL,))
    np.testing.assert_array_equal(site.classifier.head.learner.counts, [10, 10, 10, 10, 10])
    assert all(site.answers(k) == {label} for k, label in enumerate((*LABELS, NEW_LABEL)))


# the guard has the last word


def test_a_projector_that_explains_little_is_found_out(site: Site, other_model: TinyModel, projector: Way, tmp_path):
    entry, content = projector
    arrays = read_npz(content, tmp_path)
    wide = arrays | {"residual": (1e4 * np.eye(16)).astype(np.float32)}
    site.teach(4)
    with pytest.raises(UpdateRefusedError, match=r"'center': 0\.\d{4} of its examples would be answered right"):
        site.activate(2, other_model, **with_projector(entry, npz(wide)))
    assert (site.release, site.answers(4)) == (1, {NEW_LABEL})


def test_a_class_that_harms_the_shipped_ones_stays_behind(site: Site, other_model: TinyModel, projector: Way, tmp_path):
    entry, content = projector
    arrays = read_npz(content, tmp_path)
    target = other_model.head["int8/sums"][0] / other_model.head["int8/counts"][0]
    onto_a_class = arrays | {"weight": np.zeros((16, 16), np.float32), "bias": target.astype(np.float32)}
    site.teach(4)
    with pytest.raises(UpdateRefusedError, match=r"would lose 10 of its 10 kept examples|old classes would fall"):
        site.activate(2, other_model, **with_projector(entry, npz(onto_a_class)))
    assert site.release == 1


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_a_projector_of_absurd_numbers_moves_nothing(
    site: Site, other_model: TinyModel, projector: Way, tmp_path: Path, name: str
):
    entry, content = projector
    arrays = read_npz(content, tmp_path)
    site.teach(4)
    with np.errstate(all="ignore"), pytest.raises(UpdateRefusedError, match="would drop 'center'"):
        site.activate(2, other_model, **with_projector(entry, npz(arrays | {name: np.full_like(arrays[name], 3e38)})))
    assert (site.release, site.answers(4)) == (1, {NEW_LABEL})


def test_one_class_too_many_stays_behind_alone(site: Site, other_model: TinyModel, projector: Way):
    site.teach(4)
    spec = replace(site.serving.model.manifest.learning, max_classes=4)
    migration = site.activate(2, other_model, accept_loss=True, **with_projector(*projector), learning=spec)
    assert migration.fate.dropped == (NEW_LABEL,)
    assert "may learn 4" in migration.reasons[NEW_LABEL]


@pytest.mark.parametrize("name", ["weight", "backbones", "residual"])
def test_a_projector_of_others_is_refused_by_name(tmp_path: Path, projector: Way, name: str):
    entry, content = projector
    arrays = read_npz(content, tmp_path)
    ends = {"from_backbone": entry.from_backbone, "to_backbone": entry.to_backbone}
    path = tmp_path / "projector.npz"
    path.write_bytes(content)
    assert read_projector(path, **ends, dims=(16, 16)).weight.dtype == np.float64
    odd = {"weight": np.zeros((3, 16)), "residual": np.zeros((16, 16), str)}.get(name, arrays["backbones"][::-1])
    path.write_bytes(npz(arrays | {name: odd}))
    with pytest.raises(ArtifactError, match=r"projector\.npz: .*; export the bundle again"):
        read_projector(path, **ends, dims=(16, 16))
    path.write_bytes(npz({key: array for key, array in arrays.items() if key != name}))
    with pytest.raises(ArtifactError, match=f"is no projector .*{name}"):
        read_projector(path, **ends, dims=(16, 16))


def test_a_projector_cannot_fill_the_memory(tmp_path: Path):
    ends = {"from_backbone": "a", "to_backbone": "b"}
    path = tmp_path / "projector.npz"
    np.savez_compressed(path, weight=np.zeros((1000, 1000)))  # a few kilobytes
    with pytest.raises(ArtifactError, match=r"weight\.npy is compressed"):
        read_projector(path, **ends, dims=(16, 16))
    with zipfile.ZipFile(path, "w") as archive, archive.open("weight.npy", "w") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_projector(path, **ends, dims=(16, 16))
