"""Taking a lesson back: bit for bit as if it had never been, over restarts, and refused where that cannot be."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import device.history
from device.classifier import Classifier, Head
from device.contract.errors import LearningError
from device.history import Lesson, from_arrays, to_arrays
from tests.device.test_classifier import Board, board  # noqa: F401  # the fixture
from tests.support.tiny_bundle import LABELS, NEW_LABEL


def facts(head: Head) -> dict[str, object]:
    """Everything that answers or guards."""
    arrays = {"weight": head.weight, "bias": head.bias, "features": head.kept.features, "kept": head.kept.labels}
    arrays |= head.learner.state()
    return {"labels": head.labels} | {name: array.tobytes() for name, array in arrays.items()}


def teach(classifier: Classifier, board: Board, *lessons: tuple[str, int, int]) -> list[dict[str, object]]:  # noqa: F811
    """Teach (id, class index, seed); returns the facts before each lesson and after the last."""
    states = [facts(classifier.head)]
    for name, class_index, seed in lessons:
        label = [*LABELS, NEW_LABEL][class_index]
        classifier.learn(board.features(class_index, count=6, seed=seed), label, lesson=name)
        states.append(facts(classifier.head))
    return states


THREE = (("a", 4, 1), ("b", 0, 2), ("c", 4, 3))


def test_the_last_lessons_are_taken_back_one_by_one(board: Board):  # noqa: F811
    classifier = board.classifier()
    states = teach(classifier, board, *THREE)
    for number, name in ((2, "c"), (1, "b"), (0, "a")):
        head, lesson = classifier.undo()
        assert (lesson.id, facts(head)) == (name, states[number])
        assert facts(board.classifier().head) == states[number]  # on the disk, too
    assert (classifier.head.version, classifier.head.labels) == (6, LABELS)
    with pytest.raises(LearningError, match="no lesson is here to be taken back"):
        classifier.undo()


def test_a_named_lesson_is_taken_back_after_a_restart(board: Board):  # noqa: F811
    teach(board.classifier(), board, *THREE)
    again = board.classifier()
    head, _ = again.undo("b", command="undo-1")
    fresh = board.classifier(head="another")
    assert facts(head) == teach(fresh, board, THREE[0], THREE[2])[-1]
    assert again.has_learned("undo-1")
    assert [lesson.id for lesson in again.head.history] == ["a", "c"]


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0, 1, 4]), min_size=1, max_size=5), st.data())
def test_undo_is_as_if_the_lesson_had_never_been(board: Board, classes, data):  # noqa: F811
    lessons = [(f"l{i}", class_index, i) for i, class_index in enumerate(classes)]
    name = str(data.draw(st.integers(0, 10**9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.history, "MAX_LESSONS", 3)
        classifier = board.classifier(head=name)
        (board.directory / "state").mkdir(exist_ok=True)
        for path in (board.directory / "state").iterdir():
            path.unlink()
        teach(classifier, board, *lessons)
        taken = data.draw(st.sampled_from(lessons[-3:]))
        head, _ = classifier.undo(taken[0])
        assert facts(board.classifier(head=name).head) == facts(head)
    for path in (board.directory / "state").iterdir():
        path.unlink()
    rest = teach(board.classifier(head=f"{name}-fresh"), board, *(lesson for lesson in lessons if lesson != taken))
    assert facts(head) == rest[-1]


def test_old_lessons_become_part_of_the_start(board: Board, monkeypatch):  # noqa: F811
    monkeypatch.setattr(device.history, "MAX_LESSONS", 2)
    classifier = board.classifier()
    states = teach(classifier, board, *THREE)
    with pytest.raises(LearningError, match=r"lesson 'a' cannot be taken back; those that can are: 'b', 'c'"):
        classifier.undo("a")
    again = board.classifier()
    again.undo()
    again.undo()
    assert facts(again.head) == states[1]


def test_a_lesson_that_another_builds_on_stays(board: Board, monkeypatch):  # noqa: F811
    classifier = board.classifier()
    teach(classifier, board, *THREE)
    before = classifier.head
    teach_one = classifier.propose

    def refuse(old: Head, label: str, features: np.ndarray) -> Head:
        if label == NEW_LABEL:
            raise LearningError("too few")
        return teach_one(old, label, features)

    monkeypatch.setattr(classifier, "propose", refuse)
    with pytest.raises(
        LearningError, match=r"lesson 'a' stays: lesson 'c' builds on it \(too few\); take that back first"
    ):
        classifier.undo("a")
    assert classifier.head is before


def test_a_state_of_an_earlier_version_has_no_lessons_to_take_back_but_learns_more(board: Board):  # noqa: F811
    teach(board.classifier(), board, THREE[0])
    path = board.state_file()
    with np.load(path) as file:
        kept = {name: array for name, array in file.items() if not name.startswith(("history", "start"))}
    np.savez(path, **kept)
    classifier = board.classifier()
    states = teach(classifier, board, THREE[1])
    assert facts(board.classifier().undo()[0]) == states[0]


def test_damaged_lessons_are_refused_by_name():
    good = to_arrays((Lesson("a", "x", np.ones((2, 3), np.float32)), Lesson("b", "y", np.zeros((1, 3), np.float32))))
    assert [lesson.id for lesson in from_arrays(good)] == ["a", "b"]
    for name in good:
        with pytest.raises((KeyError, ValueError)):
            from_arrays({key: array for key, array in good.items() if key != name})
    with pytest.raises(ValueError, match="do not fit"):
        from_arrays(good | {"counts": np.array([2, 2])})
