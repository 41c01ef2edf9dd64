"""Progress in a log: plain lines, not too many, with how long it will still take."""

import itertools

import host.terminal
from host.terminal import StageLines


def lines_of(monkeypatch, capsys, reports, *, seconds_each: float) -> list[str]:
    times = itertools.count(100.0, seconds_each)
    now = [100.0]
    monkeypatch.setattr(host.terminal.time, "monotonic", lambda: now[0])
    lines = StageLines()
    for report in reports:
        now[0] = next(times)
        lines(*report)
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_few_lines_with_the_time_left(monkeypatch, capsys):
    reports = [("train", done, 100, "loss 1") for done in range(101)]
    lines = lines_of(monkeypatch, capsys, reports, seconds_each=4)
    assert lines[0] == "train: 0/100 loss 1"
    assert "train: 60/100 loss 1, about 3 min left" in lines
    assert "train: 90/100 loss 1, about 40 s left" in lines
    assert lines[-1] == "train: 100/100 loss 1"
    assert len(lines) < 40


def test_a_run_that_goes_on_is_timed_from_where_it_went_on(monkeypatch, capsys):
    reports = [("train", done, 100, "") for done in range(90, 101)]
    lines = lines_of(monkeypatch, capsys, reports, seconds_each=20)
    assert lines[1] == "train: 91/100 , about 3 min left"
