"""A few broken artifacts through the verifier; the rest of the 50 in the slow tier and in `bench/results`."""

import json
from pathlib import Path

import pytest

from bench.verifier_mutations import CASES, FLOAT, INT8, break_artifact, judge, make_subject, require_sound

FAMILY = "efficientformer/field-32"
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "verifier_mutations.json"


@pytest.mark.parametrize("precision", [FLOAT, INT8])
def test_broken_artifacts_are_caught_and_named(precision, tmp_path):
    subject = make_subject(FAMILY)
    require_sound(subject, precision)
    broken = break_artifact(subject, precision, tmp_path, seed=5)
    rows = [judge(subject, precision, next(broken)) for _ in range(2)]
    assert all(row["caught"] and row["right_place"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), CASES)
def test_all_broken_artifacts_are_caught(family, precision, tmp_path):
    subject = make_subject(family)
    require_sound(subject, precision)
    broken = break_artifact(subject, precision, tmp_path, seed=list(CASES).index((family, precision)))
    rows = [judge(subject, precision, next(broken)) for _ in range(CASES[family, precision])]
    assert all(row["caught"] for row in rows)


def test_the_recorded_table_holds_what_it_must_show():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert len(rows) == sum(CASES.values()) == 50
    assert all(row["caught"] and row["output_change"] >= 1e-3 for row in rows)
    assert sum(row["right_place"] for row in rows) >= 45
