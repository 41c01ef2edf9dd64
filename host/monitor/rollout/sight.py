"""What the store knows of one board that matters to a rollout."""

from dataclasses import dataclass

from device.contract.topics import DeviceId
from host.monitor.rollout.journal import Board
from host.monitor.rollout.plan import Plan
from host.monitor.rows import DeviceRow, EventRow
from host.monitor.store import Store
from host.monitor.views import shown_status

BEFORE_S = 3600.0
"""How far back the model before is looked at."""
EVENTS = 100
PASSING = frozenset({"busy", "disk", "interrupted", "slow", "unreachable", "window", "rollback"})
"""Reasons of refusals that say nothing about the release. `rollback`: the board's own channel is behind what it was told to take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One board, now.

    Attributes:
        is_online: it said so, and spoke within minutes.
        release: what it serves; None: nothing, or it was never heard of.
        installed: it has the release on probation, or has had.
        confirmed: it has the release for good.
        refusal: why it does not have it, or not any more, by its events; "" while there is nothing of that kind.
        no: its answer to the last command, if that was no. It may be for a reason that passes: only events speak of the release.
        latency_ratio: median frame latency with the release, to that before; None where one of them is not known.
        error_share: of frames since it was confirmed; None without frames.
        drift: the largest since then.
    """

    device: DeviceId
    is_online: bool = False
    release: int | None = None
    installed: bool = False
    confirmed: bool = False
    refusal: str = ""
    no: str = ""
    latency_ratio: float | None = None
    error_share: float | None = None
    drift: float | None = None


def look(store: Store, plan: Plan, row: DeviceRow, board: Board | None, *, now: float) -> Sight:
    """Look at one board; without `board`, which was not told anything yet, only at what it serves."""
    model = row.state.model if row.state else None
    seen = Sight(
        device=row.device,
        is_online=shown_status(row, now) == "online",
        release=model.release if model else None,
    )
    if board is None:
        return seen
    events = [event for event in store.events(row.device, limit=EVENTS) if event.received >= board.asked]
    mine = [event for event in events if event.event.data.get("release", plan.release) == plan.release]
    is_confirmed = _has(mine, "confirmed") and seen.release == plan.release
    answer = store.reply(row.device, board.command) if board.command else None
    figures = _figures(store, row, board, now) if board.confirmed else {}
    return Sight(
        device=seen.device,
        is_online=seen.is_online,
        release=seen.release,
        installed=_has(mine, "installed") or is_confirmed,
        confirmed=is_confirmed or (seen.release == plan.release and board.confirmed > 0),
        refusal=_refusal(mine),
        no="" if answer is None or answer.ok else answer.error or "no reason given",
        **figures,
    )


def _has(events: list[EventRow], kind: str) -> bool:
    return any(event.event.kind == kind for event in events)


def _refusal(events: list[EventRow]) -> str:
    for event in events:  # newest first: a confirmation after a refusal is the last word
        if event.event.kind in ("confirmed", "installed"):
            return ""
        data = event.event.data
        is_about_it = "release" in data or data.get("reason") not in PASSING  # what was tested names its release
        if event.event.kind in ("rolled-back", "refused") and is_about_it:
            return f"{data.get('reason', '')}: {data.get('detail', '')}".strip(": ")
    return ""


def _figures(store: Store, row: DeviceRow, board: Board, now: float) -> dict[str, float | None]:
    ahead_s = row.latest_time - row.last_seen if row.latest_time else 0.0  # the board's clock, which telemetry goes by
    asked, confirmed = board.asked + ahead_s, board.confirmed + ahead_s
    names = ("latency/p50", "frames", "errors", "drift")
    before = store.telemetry(row.device, names[:1], since=asked - BEFORE_S, until=asked).values
    since = store.telemetry(row.device, names, since=confirmed, until=now + ahead_s).values
    old, new = (_median(values.get("latency/p50", [])) for values in (before, since))
    frames, errors = (_sum(since.get(name, [])) for name in ("frames", "errors"))
    drifts = [value for value in since.get("drift", []) if value is not None]
    return {
        "latency_ratio": new / old if old and new else None,
        "error_share": errors / (frames + errors) if frames + errors else None,
        "drift": max(drifts, default=None),
    }


def _median(values: list[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def _sum(values: list[float | None]) -> float:
    return sum(value for value in values if value is not None)
