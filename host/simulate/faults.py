"""What goes wrong in a simulated fleet, for whom and when. All of it follows from the seed and a board's number.

loss=RATE                        of telemetry and events, that share costs the link before the acknowledgement
drift=RATE[@S]                   that share of the boards sees other frames from S seconds on
bad-model=RATE:RELEASE:EFFECT    on that share of the boards, this release is bad: see `EFFECTS`
clock-skew=RATE                  that share has a clock that is hours off, or was never set
reboot-storm=RATE[@S]            that share reboots within `STORM_S` seconds
spool-overflow=RATE[@S]          that share has a spool of a few messages and no link for `OUTAGE_WINDOWS` windows
"""

import random
import re
from dataclasses import dataclass

from host.errors import RecipeError

KINDS = ("loss", "drift", "bad-model", "clock-skew", "reboot-storm", "spool-overflow")
STARTS = ("drift", "reboot-storm", "spool-overflow")
EFFECTS = {
    "selftest": "refused by its self-test, before it serves",
    "probation": "rolled back while it is on probation",
    "latency": "confirmed, then five times as slow",
    "errors": "confirmed, then a third of the frames fails",
    "drift": "confirmed, then its features are far from those of the training",
}
STORM_S = 3.0
OUTAGE_WINDOWS = 12
"""Telemetry windows that pass without a link: several times what the small spool holds."""
SKEW_HOURS = (1.0, 12.0)
NEVER_SET_SHARE = 0.25
"""Of the clocks that are wrong, those that begin in 1970 at each boot."""
_FORM = re.compile(
    r"(?P<kind>[a-z-]+)=(?P<rate>[0-9.]+)(@(?P<start>[0-9.]+))?(:(?P<release>[0-9]+):(?P<effect>[a-z]+))?"
)
_USAGE = "write NAME=RATE, NAME=RATE@SECONDS, or bad-model=RATE:RELEASE:EFFECT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault: the share 0..1 that it strikes, seconds after the start; release and effect of a bad model."""

    kind: str
    rate: float
    start_s: float = 0.0
    release: int = 0
    effect: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"fault {self.kind!r} is unknown; faults are {', '.join(KINDS)}")
        if not 0 <= self.rate <= 1:
            raise RecipeError(f"fault {self.kind}: the rate must be 0..1, got {self.rate:g}")
        if self.start_s and self.kind not in STARTS:
            raise RecipeError(f"fault {self.kind}: takes no start; only {', '.join(STARTS)} do")
        if (self.kind == "bad-model") != bool(self.release) or bool(self.release) != bool(self.effect):
            raise RecipeError(f"fault {self.kind}: {_USAGE}; only bad-model has a release, which is 1 or more")
        if self.effect and self.effect not in EFFECTS:
            raise RecipeError(f"fault bad-model: effect {self.effect!r} is unknown; effects are {', '.join(EFFECTS)}")


def parse_fault(text: str) -> Fault:
    """Read one fault as the command line has it; RecipeError names what is wrong."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise RecipeError(f"fault {text!r}: {_USAGE}")
    try:
        return Fault(
            kind=found["kind"],
            rate=float(found["rate"]),
            start_s=float(found["start"] or 0),
            release=int(found["release"] or 0),
            effect=found["effect"] or "",
        )
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"fault {text!r}: {_USAGE}") from error


class FaultPlan:
    """What befalls one board.

    Attributes:
        drifts_at_s: when its frames change, seconds after the start; None: they do not.
        clock_offset_s: how far its clock is off; None: it was never set, and begins in 1970 at each boot.
        reboots_at_s: when it reboots.
        loses_link_at_s: when its link goes and its small spool overflows; None: never.
        bad_releases: the effect of each release that is bad here.
    """

    def __init__(self, faults: tuple[Fault, ...], *, seed: int, number: int) -> None:
        self._loss = random.Random(f"{seed}/{number}/loss")
        self._loss_rate = 0.0
        self.drifts_at_s: float | None = None
        self.clock_offset_s: float | None = 0.0
        self.loses_link_at_s: float | None = None
        self.bad_releases: dict[int, str] = {}
        self.reboots_at_s: tuple[float, ...] = ()
        for place, fault in enumerate(faults):
            rng = random.Random(f"{seed}/{number}/{place}/{fault.kind}")
            if fault.kind == "loss":
                self._loss_rate = fault.rate
            elif rng.random() < fault.rate:
                self._strike(fault, rng)
        if self.loses_link_at_s is not None:
            self._loss_rate = 0.0

    def _strike(self, fault: Fault, rng: random.Random) -> None:
        match fault.kind:
            case "drift":
                self.drifts_at_s = fault.start_s
            case "clock-skew":
                self.clock_offset_s = _wrong_clock(rng)
            case "reboot-storm":
                self.reboots_at_s = (*self.reboots_at_s, fault.start_s + rng.uniform(0, STORM_S))
            case "spool-overflow":
                self.loses_link_at_s = fault.start_s
            case "bad-model":
                self.bad_releases[fault.release] = fault.effect

    def cuts_next(self) -> bool:
        """Whether the link is lost while the next numbered message is under way; asked once for each, in order."""
        return self._loss_rate > 0 and self._loss.random() < self._loss_rate


def _wrong_clock(rng: random.Random) -> float | None:
    if rng.random() < NEVER_SET_SHARE:
        return None
    return rng.choice((-1, 1)) * rng.uniform(*SKEW_HOURS) * 3600
