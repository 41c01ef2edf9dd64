"""What the DeiT-LT specification says must hold, judged by the rows of the table `cifar10_lt`.

Names of data sets and methods, as the rows have them, live here too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.claim_findings import Finding, incomplete, judged
from bench.record import Row

CIFAR, TINY = "CIFAR-10-LT (JPEG q75)", "Tiny-ImageNet-100-LT"
SETS = ((CIFAR, 100, 0), (CIFAR, 100, 1), (CIFAR, 50, 0))
"""Data, imbalance and seed of the trainings that judge the claims."""
SHARP_SETS = SETS[:1]
"""Those with a teacher trained without sharpness-aware steps, too."""
SCRATCH, DEIT_A, DEIT_B, DEIT_LT = "scratch", "deit-a", "deit-b", "deit-lt"
TEACHER, TEACHER_A, SHARP_TEACHER, DEIT_LT_SHARP = "teacher", "teacher-a", "teacher-sharp", "deit-lt-sharp"

_Found = Mapping[tuple[str, str], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Check:
    """A claim's figure in one set of trainings, and whether it holds there."""

    claim: int
    figure: str
    holds: bool

    def __str__(self) -> str:
        return f"claim {self.claim}, {self.figure}: {'reproduced' if self.holds else 'not reproduced'}"


def judge(rows: Sequence[Row], claim: int) -> Finding:
    """A claim holds where it holds in every set of trainings."""
    sets = SHARP_SETS if claim == 5 else SETS
    checks = {chosen: check for chosen in sets for check in list_checks(rows, *chosen) if check.claim == claim}
    figure = "; ".join(f"imbalance {rho}, seed {seed}: {check.figure}" for (_, rho, seed), check in checks.items())
    if len(checks) < len(sets):
        return incomplete(len(checks), "cifar10_lt", figure, of=len(sets), what="sets of trainings")
    failed = [f"imbalance {rho}, seed {seed}" for (_, rho, seed), check in checks.items() if not check.holds]
    return judged(not failed, figure, f"it does not hold at {', '.join(failed)}")


def list_checks(rows: Sequence[Row], data: str, imbalance: int, seed: int) -> Iterator[Check]:
    """What became of the claims in one set of trainings; only of those whose trainings are finished."""
    found = {
        (row["method"], row["head"]): row
        for row in rows
        if (row["data"], row["imbalance"], row["seed"]) == (data, imbalance, seed)
    }
    if (DEIT_LT, "average") not in found:
        return
    yield _experts(found)
    yield _reweighting(found)
    if (DEIT_A, "average") in found:
        yield _disagreement(found)
    if {(TEACHER, "cls"), (SCRATCH, "cls")} <= found.keys():
        yield _order(found)
    if {(DEIT_LT_SHARP, "average"), (SHARP_TEACHER, "cls"), (TEACHER, "cls")} <= found.keys():
        yield _flatness(found)


def gain_over_deit(rows: Sequence[Row], data: str, imbalance: int, seed: int) -> float | None:
    """Overall accuracy of DeiT-LT less that of DeiT (a), averaged heads; None where either is not trained yet."""
    found = {
        row["method"]: row["overall"]
        for row in rows
        if (row["data"], row["imbalance"], row["seed"], row["head"]) == (data, imbalance, seed, "average")
    }
    return found[DEIT_LT] - found[DEIT_A] if {DEIT_LT, DEIT_A} <= found.keys() else None


def _disagreement(found: _Found) -> Check:
    ours, baseline = found[DEIT_LT, "average"], found[DEIT_A, "average"]
    start, end, other = ours["disagreement_start"], ours["disagreement_end"], baseline["disagreement_end"]
    figure = f"disagreement of CLS and DIST {start} to {end} with DeiT-LT's teacher, {other} with DeiT (a)'s"
    return Check(1, figure, end > max(start, 2 * other))


def _experts(found: _Found) -> Check:
    cls, dist, average = (found[DEIT_LT, head] for head in ("cls", "dist", "average"))
    figure = (
        f"few: CLS {cls['few']}, DIST {dist['few']}; many: CLS {cls['many']}, DIST {dist['many']}; overall: CLS "
        f"{cls['overall']}, DIST {dist['overall']}, average {average['overall']}"
    )
    is_best = average["overall"] > max(cls["overall"], dist["overall"])
    return Check(2, figure, dist["few"] > cls["few"] and cls["many"] >= dist["many"] and is_best)


def _reweighting(found: _Found) -> Check:
    ours = found[DEIT_LT, "average"]
    few = ours["dist_few_before_reweighting"], ours["dist_few_end"]
    apart = ours["disagreement_before_reweighting"], ours["disagreement_end"]
    figure = f"re-weighting takes DIST on few from {few[0]} to {few[1]}, the disagreement from {apart[0]} to {apart[1]}"
    return Check(3, figure, few[1] > few[0] and apart[1] > apart[0])


def _order(found: _Found) -> Check:
    overall = [found[key]["overall"] for key in ((DEIT_LT, "average"), (TEACHER, "cls"), (SCRATCH, "cls"))]
    return Check(4, "student {}, teacher {}, scratch {}".format(*overall), overall[0] > overall[1] > overall[2])


def _flatness(found: _Found) -> Check:
    flat, sharp = found[DEIT_LT, "average"]["dist_rank"], found[DEIT_LT_SHARP, "average"]["dist_rank"]
    apart = found[SHARP_TEACHER, "cls"]["overall"] - found[TEACHER, "cls"]["overall"]
    figure = (
        f"rank of DIST features {flat} with the flat teacher, {sharp} with the sharp; the sharp teacher's accuracy is "
        f"{apart:+.4f} of the flat one's"
    )
    return Check(5, figure, flat < sharp)
