"""What a store answers: plain frozen rows, the same for every database."""

from dataclasses import dataclass, field

from device.contract.messages import Event, State
from device.contract.topics import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """One device as the fleet page shows it; times are Unix seconds of this machine's clock unless said otherwise.

    `state` is the last birth of the newest boot (or its will, if no birth was ever seen) and `status` is what that boot
    said last. `missing` counts messages lost while this store was watching; `unwatched` those that the device had
    numbered before the store first heard of it.
    """

    device: DeviceId
    status: str  # online | offline | unknown
    boot: str | None
    state: State | None
    first_seen: float
    last_seen: float
    latest: dict[str, float] = field(default_factory=dict)  # the newest telemetry
    latest_time: float | None = None  # its time by the device's clock
    recent_latency_s: tuple[float, ...] = ()  # p50 of the newest windows, oldest first
    received: int = 0
    duplicates: int = 0
    missing: int = 0
    unwatched: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Timelines over shared times (device clock, ascending); None where nothing was measured.

    A value stands for `resolution_s` seconds, 0 where it is of one message; then it is of several what `shown_as` says.
    """

    times: list[float]
    values: dict[str, list[float | None]]
    resolution_s: float = 0.0
    shown_as: dict[str, str] = field(default_factory=dict)  # for example "frame-weighted mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """An event and when it arrived."""

    event: Event
    received: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Sequence numbers `first..last` of one boot that were skipped; `closed` is when the last missing one came late."""

    boot: str
    first: int
    last: int
    missing: int
    watched: bool
    opened: float
    closed: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A message that could not be read; `payload` is its beginning, `seen` how often exactly these bytes came."""

    topic: str
    reason: str
    payload: bytes
    payload_bytes: int
    seen: int
    first_seen: float
    last_seen: float
