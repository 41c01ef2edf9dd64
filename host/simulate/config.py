"""What a simulated fleet is: how many boards, of which kind, how often they speak, and what goes wrong."""

from dataclasses import dataclass
from pathlib import Path

from device.contract.topics import is_id
from host.errors import RecipeError
from host.simulate.faults import Fault

MAX_DEVICES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How fast a board is. `backoff_s` are the first and the last pause between two attempts to connect."""

    frames_per_s: float = 5.0
    latency_s: float = 0.04
    transfer_bytes_per_s: float = 4e6
    selftest_s: float = 3.0
    boot_s: float = 2.0
    backoff_s: tuple[float, float] = (1.0, 60.0)
    soak_s: float | None = None  # None: the board profile's


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """A fleet.

    Attributes:
        devices: how many boards.
        site: in their topics.
        board: their profile.
        interval_s: between two telemetry messages of a board.
        duration_s: how long it lasts; None: until somebody stops it.
        seed: of everything that is by chance, but the boot ids: a monitor would take a second run's messages for copies.
        processes: how many share the boards.
        faults: what goes wrong.
        updates: the update repository that the boards follow; None: they follow none.
        channel: of that repository.
    """

    devices: int
    site: str = "simulated"
    board: str = "generic-x86-64"
    interval_s: float = 10.0
    duration_s: float | None = None
    seed: int = 0
    processes: int = 1
    faults: tuple[Fault, ...] = ()
    updates: Path | None = None
    channel: str = "stable"
    timing: Timing = Timing()

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= MAX_DEVICES:
            raise RecipeError(f"--devices must be 1..{MAX_DEVICES}, got {self.devices}")
        if not 1 <= self.processes <= self.devices:
            raise RecipeError(f"--processes must be 1..{self.devices}, one board each at least, got {self.processes}")
        if not 0.1 <= self.interval_s <= 86400:
            raise RecipeError(f"--rate must be 0.1..86400 seconds, got {self.interval_s:g}")
        if self.duration_s is not None and not 0 < self.duration_s <= 1e7:
            raise RecipeError(f"--duration must be above 0 and at most 1e7 seconds, got {self.duration_s:g}")
        for name, value in (("--site", self.site), ("--channel", self.channel)):
            if not is_id(value):
                raise RecipeError(f"{name} {value!r}: use 1 to 64 letters, digits, '_' and '-'")

    def device_name(self, number: int) -> str:
        """The id of a board, numbered from 1: all of one length, so that they sort."""
        return f"sim-{number:0{len(str(self.devices))}d}"
