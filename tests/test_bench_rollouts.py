"""The rollouts' table at a small scale: what is good reaches all, what is bad one board, though the monitor dies."""

from pathlib import Path

import pytest

from bench.rollouts import run

SMALL = {"devices": 30, "stages": "1,20%,100%", "rate_s": 2.0, "soak_s": 6.0, "seed": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            "",
            {"status": "finished", "told": 30, "took": 30, "new": 30, "old": 0, "commands_per_board": 1, "by_hand": 0},
        ),
        ("bad-model=1:2:errors", {"status": "aborted", "told": 1, "took": 1, "new": 0, "old": 30, "by_hand": 0}),
    ],
)
def test_a_release_that_is_bad_reaches_the_canary_alone(tmp_path: Path, fault: str, expected: dict[str, object]):
    row = run(tmp_path, fault, **SMALL)
    assert {name: row[name] for name in expected} == expected
