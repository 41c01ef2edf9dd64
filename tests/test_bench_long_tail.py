"""bench.long_tail_claims: what became of DeiT-LT's claims, set of trainings by set of trainings."""

from collections.abc import Iterable

import pytest

from bench import cifar10_lt
from bench.claim_findings import INCOMPLETE, NOT_REPRODUCED, REPRODUCED
from bench.long_tail_claims import (
    DEIT_A,
    DEIT_LT,
    DEIT_LT_SHARP,
    SCRATCH,
    SETS,
    SHARP_SETS,
    SHARP_TEACHER,
    TEACHER,
    gain_over_deit,
    judge,
    list_checks,
)

MOMENTS = {
    "disagreement_start": 0.1,
    "disagreement_before_reweighting": 0.3,
    "disagreement_end": 0.4,
    "dist_few_before_reweighting": 0.3,
    "dist_few_end": 0.5,
}
HEADS = {
    (DEIT_LT, "cls"): {"overall": 0.55, "many": 0.8, "few": 0.2},
    (DEIT_LT, "dist"): {"overall": 0.56, "many": 0.6, "few": 0.5},
    (DEIT_LT, "average"): {"overall": 0.6, "many": 0.7, "few": 0.4, "dist_rank": 40, **MOMENTS},
    (DEIT_A, "average"): {"overall": 0.52, "disagreement_end": 0.05},
    (TEACHER, "cls"): {"overall": 0.58},
    (SCRATCH, "cls"): {"overall": 0.4},
    (SHARP_TEACHER, "cls"): {"overall": 0.57},
    (DEIT_LT_SHARP, "average"): {"overall": 0.59, "dist_rank": 50},
}


def make_rows(
    sets: Iterable = SETS, *, without: tuple[str, ...] = (), change: tuple[str, str, dict] | None = None
) -> list[dict]:
    """Rows in which every claim holds, but for what is left out or, in the first set, changed."""
    rows = []
    for data, imbalance, seed in sets:
        for (method, head), figures in HEADS.items():
            if method in without:
                continue
            row = {"data": data, "imbalance": imbalance, "seed": seed, "method": method, "head": head, **figures}
            if change and (data, imbalance, seed) == SETS[0] and (method, head) == change[:2]:
                row |= change[2]
            rows.append(row)
    return rows


@pytest.mark.parametrize("claim", range(1, 6))
def test_a_claim_that_holds_in_every_set_is_reproduced(claim):
    assert judge(make_rows(), claim).verdict == REPRODUCED
    assert judge(make_rows((SHARP_SETS if claim == 5 else SETS)[1:]), claim).verdict == INCOMPLETE


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        (1, (DEIT_LT, "average", {"disagreement_end": 0.09})),
        (1, (DEIT_A, "average", {"disagreement_end": 0.3})),
        (2, (DEIT_LT, "dist", {"few": 0.1})),
        (2, (DEIT_LT, "cls", {"many": 0.5})),
        (2, (DEIT_LT, "cls", {"overall": 0.7})),
        (3, (DEIT_LT, "average", {"dist_few_end": 0.2})),
        (3, (DEIT_LT, "average", {"disagreement_end": 0.2})),
        (4, (TEACHER, "cls", {"overall": 0.61})),
        (4, (SCRATCH, "cls", {"overall": 0.59})),
        (5, (DEIT_LT_SHARP, "average", {"dist_rank": 40})),
    ],
)
def test_one_set_in_which_it_does_not_hold_decides(claim, change):
    finding = judge(make_rows(change=change), claim)
    assert finding.verdict == NOT_REPRODUCED
    assert finding.why == "it does not hold at imbalance 100, seed 0"


@pytest.mark.parametrize(
    ("without", "claims"),
    [
        ((), [1, 2, 3, 4, 5]),
        ((DEIT_LT,), []),
        ((DEIT_A,), [2, 3, 4, 5]),
        ((SCRATCH,), [1, 2, 3, 5]),
        ((SHARP_TEACHER,), [1, 2, 3, 4]),
    ],
)
def test_only_finished_trainings_are_judged(without, claims):
    assert sorted(check.claim for check in list_checks(make_rows(without=without), *SETS[0])) == claims


def test_the_gain_is_of_the_averaged_heads():
    assert gain_over_deit(make_rows(), *SETS[0]) == pytest.approx(0.08)
    assert gain_over_deit(make_rows(without=(DEIT_A,)), *SETS[0]) is None


def test_the_table_trains_what_the_claims_need_and_says_what_became_of_them():
    jobs = {tuple(job.key.values()) for job in cifar10_lt.list_jobs()}
    assert all((*chosen, method) in jobs for chosen in SETS for method in (DEIT_LT, DEIT_A, TEACHER, SCRATCH))
    assert all((*chosen, method) in jobs for chosen in SHARP_SETS for method in (SHARP_TEACHER, DEIT_LT_SHARP))
    notes = cifar10_lt._notes(make_rows())
    assert "imbalance 100, seed 0: DeiT-LT over DeiT (a) +8.00 points; the aim is 5" in notes
    assert notes.count(": reproduced") == 5 * len(SETS)
