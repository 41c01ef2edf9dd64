"""Stages: done once, done again when an input changes, and never half done."""

import pytest

from host.pipeline import STAMP, Stage, run_stage, stage_metrics


def make_stage(calls, *, inputs=None, fail=False):
    def work(out):
        calls.append(out)
        (out / "result.txt").write_text("done")
        if fail:
            raise KeyboardInterrupt
        return {"accuracy": 0.5}

    return Stage(name="train", inputs=inputs or {"seed": 0}, work=work)


def test_second_run_does_no_work(tmp_path):
    calls = []
    first = run_stage(make_stage(calls), tmp_path)
    assert run_stage(make_stage(calls), tmp_path) == first
    assert len(calls) == 1
    assert stage_metrics(tmp_path, "train") == {"accuracy": 0.5}


def test_changed_input_or_upstream_is_work(tmp_path):
    calls = []
    run_stage(make_stage(calls), tmp_path)
    run_stage(make_stage(calls, inputs={"seed": 1}), tmp_path)
    run_stage(make_stage(calls, inputs={"seed": 1}), tmp_path, upstream="other")
    assert len(calls) == 3


def test_interrupted_stage_leaves_nothing_that_looks_finished(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run_stage(make_stage(calls, fail=True), tmp_path)
    assert not (tmp_path / "train").exists()
    run_stage(make_stage(calls), tmp_path)
    assert not (tmp_path / "train.partial").exists()


def test_interrupted_redo_keeps_the_old_result(tmp_path):
    run_stage(make_stage([]), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_stage(make_stage([], inputs={"seed": 1}, fail=True), tmp_path)
    assert (tmp_path / "train" / "result.txt").read_text() == "done"


def test_damaged_stamp_is_work(tmp_path):
    calls = []
    run_stage(make_stage(calls), tmp_path)
    (tmp_path / "train" / STAMP).write_text("{")
    run_stage(make_stage(calls), tmp_path)
    assert len(calls) == 2


def test_the_very_same_stage_finds_what_it_left(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage(make_stage([], fail=True), tmp_path)
    seen = []

    def work(out):
        seen.append((out / "result.txt").exists())
        return {}

    run_stage(Stage(name="train", inputs={"seed": 0}, work=work), tmp_path)
    assert seen == [True]
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["result.txt", STAMP]


def test_another_stage_does_not_go_on_from_it(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage(make_stage([], fail=True), tmp_path)
    seen = []

    def work(out):
        seen.append((out / "result.txt").exists())
        return {}

    run_stage(Stage(name="train", inputs={"seed": 1}, work=work), tmp_path)
    assert seen == [False]
