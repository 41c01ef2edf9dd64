"""Claims of the specifications and what becomes of them: the words of the table `claims`."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.record import Row

NUM_SEEDS = 3
"""A training is judged by as many seeds, or not at all."""
CHANGED = 0.01
"""Relative change of an output that is no rounding."""
REPRODUCED, NOT_REPRODUCED, INCOMPLETE, NOT_TESTABLE = VERDICTS = (
    "reproduced",
    "not reproduced",
    "incomplete",
    "not testable here",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What became of a claim: one of `VERDICTS`, the figure with its unit, and why it is no more than that."""

    verdict: str
    figure: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One numbered claim; `how` says what measures it, `check` does."""

    specification: str
    number: int
    statement: str
    how: str | None
    check: Callable[[], Finding]

    def row(self) -> Row:
        finding = self.check()
        return {
            "specification": self.specification,
            "claim": self.number,
            "statement": self.statement,
            "verdict": finding.verdict,
            "figure": finding.figure,
            "how": self.how,
            "why": finding.why,
        }


def judged(holds: bool, figure: str, why_not: str | None = None) -> Finding:
    """Reproduced or not."""
    return Finding(verdict=REPRODUCED if holds else NOT_REPRODUCED, figure=figure, why=None if holds else why_not)


def untestable(why: str) -> Callable[[], Finding]:
    """A check that can only say why there is none."""
    return lambda: Finding(verdict=NOT_TESTABLE, why=why)


def incomplete(
    count: int, name: str, figure: str | None = None, *, of: int = NUM_SEEDS, what: str = "seeds"
) -> Finding:
    why = f"{count} of {of} {what} measured so far; python -m bench.{name} goes on"
    return Finding(verdict=INCOMPLETE, figure=figure if count else None, why=why)
