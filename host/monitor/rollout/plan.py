"""What a rollout is to do: which release, to which boards in which order, and what would stop it.

A board's place in the order is the hash of its name and the rollout's id: no list is kept, boards that appear later have
a place too, and another rollout begins with other boards. Named canaries come first.
"""

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from device.contract.topics import DeviceId, is_id
from host.errors import FleetError

_STAGE = re.compile(r"(\d{1,6})|(\d{1,3}(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """How far it goes before somebody looks: `count` boards, or a `share` of all, in 0..1."""

    count: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.count} board{'s' * (self.count != 1)}" if self.share is None else f"{100 * self.share:g}%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What must hold.

    Attributes:
        max_failed: share of the boards that were told, which may refuse the release, take it back or do badly with it.
            Less than one board counts as none.
        min_done: share of the boards that were told, which must have it and do well before more are told.
        soak_s: how long a board is watched after it has confirmed.
        patience_s: how long a stage waits for boards that do not answer; those count as away.
        max_latency_ratio: of the median frame latency, to that of the model before.
        max_error_share: of frames, that may be bad or fail.
        max_drift: of the features, in standard deviations.
    """

    max_failed: float = 0.02
    min_done: float = 0.9
    soak_s: float = 600.0
    patience_s: float = 3600.0
    max_latency_ratio: float = 1.5
    max_error_share: float = 0.02
    max_drift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_failed", "min_done", "max_error_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise FleetError(f"rollout: {name} must be 0..1, got {getattr(self, name)}")
        for name in ("soak_s", "patience_s", "max_drift"):
            if not getattr(self, name) >= 0:
                raise FleetError(f"rollout: {name} must be 0 or more, got {getattr(self, name)}")
        if not self.max_latency_ratio > 0:
            raise FleetError(f"rollout: max_latency_ratio must be above 0, got {self.max_latency_ratio}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One rollout.

    Attributes:
        id: its name; part of the ids of its commands.
        channel: of the update source, which offers the release and which these boards do not follow by themselves.
        name: of the bundle.
        version: of the bundle.
        release: of the bundle.
        stages: each reaches at least as far as the one before.
        canaries: boards that come first, whatever their place.
        only: patterns of `SITE/DEVICE`; empty: all boards.
        limits: what would stop it.
        accept_loss: also where a board would forget what it was taught.
        by: who started it.
        created: Unix seconds.
    """

    id: str
    channel: str
    name: str
    version: str
    release: int
    created: float
    stages: tuple[Stage, ...] = (Stage(count=1), Stage(share=0.1), Stage(share=0.5), Stage(share=1.0))
    canaries: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    limits: Limits = Limits()
    accept_loss: bool = False
    by: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "channel"):
            if not is_id(getattr(self, name)):
                raise FleetError(
                    f"rollout: {name} {getattr(self, name)!r:.100} is no name; use letters, digits, - and _"
                )
        if not self.stages:
            raise FleetError("rollout: there must be a stage")

    def is_meant(self, device: DeviceId) -> bool:
        """Whether the rollout is for this board at all."""
        name = str(device)
        return not self.only or name in self.canaries or any(fnmatchcase(name, pattern) for pattern in self.only)

    def place(self, device: DeviceId) -> float:
        """Where in 0..1 a board comes; canaries are in front of all."""
        if str(device) in self.canaries:
            return -1.0
        digest = hashlib.sha256(f"{self.id}/{device}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56

    def members(self, stage: int, devices: list[DeviceId]) -> list[DeviceId]:
        """The boards that have a turn up to and with a stage, in their order."""
        order = sorted((device for device in devices if self.is_meant(device)), key=self.place)
        reach = max(self._reach(self.stages[number], order) for number in range(stage + 1))
        return order[: max(reach, len(self.canaries) and sum(self.place(device) < 0 for device in order))]

    def _reach(self, stage: Stage, order: list[DeviceId]) -> int:
        if stage.count is not None:
            return stage.count
        assert stage.share is not None
        return sum(self.place(device) < stage.share for device in order)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Stages as written: `1, 10%, 50%, 100%`.

    Raises:
        FleetError: a word is neither a number of boards nor a percentage, or a stage reaches less far than one before.
    """
    stages: list[Stage] = []
    for word in (word.strip() for word in text.split(",")):
        found = _STAGE.fullmatch(word)
        share = float(found[2]) / 100 if found and found[2] else None
        if not found or found[1] == "0" or (share is not None and not 0 < share <= 1):
            raise FleetError(
                f"rollout: stage {word!r} is neither a number of boards nor a percentage, as in 1,10%,100%"
            )
        stages.append(Stage(count=int(found[1])) if found[1] else Stage(share=share))
    for kind in ("count", "share"):
        reach = [getattr(stage, kind) for stage in stages if getattr(stage, kind) is not None]
        if reach != sorted(set(reach)):
            raise FleetError(f"rollout: stages {text!r} must each reach further than the one before")
    if any(stage.count is not None for stage in stages[1:] if stages[0].share is not None):
        raise FleetError(f"rollout: stages {text!r}: numbers of boards come before percentages")
    return tuple(stages)
