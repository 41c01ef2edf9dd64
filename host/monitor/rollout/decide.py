"""What a rollout does next: a pure function of its plan, its journal and what is seen of the boards.

Boards are told in stages. A board that confirms the release and does well for the soak is done; one that refuses it, takes
it back or does badly has failed. More failures than allowed abort the rollout, and every board that has the release is
told to go back, also one that only now comes home. Too few that are done within the patience, because they are away,
pause it: a person decides. Asked twice, this function says nothing new until something is.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from device.contract.topics import DeviceId
from host.monitor.rollout.journal import Board, Entry, Progress, parse_device
from host.monitor.rollout.plan import Limits, Plan
from host.monitor.rollout.sight import Sight

SETTLED = ("done", "failed", "reverted", "stuck")
ATTEMPTS_APART_S = 60.0
"""A board that said no, for whatever passes, or whose command expired is told again after this time."""
MAX_REVERTS = 5
"""A board that says no so often to going back will not: a person must look at it."""


def decide(plan: Plan, progress: Progress, sights: Mapping[DeviceId, Sight], *, now: float) -> list[Entry]:
    """The lines to write, and to act upon, now; none: nothing is due."""
    progress_after = _copied(progress)
    entries: list[Entry] = []

    def take(found: Iterator[Entry]) -> None:
        for entry in found:
            entries.append(entry)
            progress_after.add(entry)

    if progress.status in ("running", "paused", "finished"):
        take(_board_news(plan, progress_after, sights, now))
    if progress.status in ("running", "paused") and (reason := _reason_to_abort(plan, progress_after)):
        take(iter([Entry(time=now, kind="aborted", reason=reason)]))
    if progress_after.status == "aborted":
        take(_reverts(plan, progress_after, sights, now))
    elif progress_after.status == "running":
        take(_forward(plan, progress_after, sights, now))
    return entries


def command_id(plan: Plan, verb: str, device: str, number: int) -> str:
    """The same for the same step, whoever takes it: a board obeys an id once. At most 128 characters, as boards allow."""
    return f"{plan.id}.{verb}.{hashlib.sha256(device.encode()).hexdigest()[:16]}.{number}"


def _board_news(plan: Plan, progress: Progress, sights: Mapping[DeviceId, Sight], now: float) -> Iterator[Entry]:
    for name, board in list(progress.boards.items()):
        sight = sights.get(parse_device(name))
        if sight and board.state in ("asked", "confirmed", "done") and (entry := _news(plan, name, board, sight, now)):
            yield entry


def _news(plan: Plan, name: str, board: Board, sight: Sight, now: float) -> Entry | None:
    if sight.refusal:
        return Entry(time=now, kind="failed", device=name, reason="refused", detail=sight.refusal)
    if board.state == "done":
        return None
    if board.state == "asked":
        return Entry(time=now, kind="confirmed", device=name) if sight.confirmed else None
    if trouble := _trouble(plan.limits, sight):
        return Entry(time=now, kind="failed", device=name, reason="health", detail=trouble)
    if sight.release != plan.release:
        return Entry(time=now, kind="failed", device=name, reason="gone", detail=f"it serves release {sight.release}")
    if now - board.confirmed >= plan.limits.soak_s and sight.is_online:
        return Entry(time=now, kind="done", device=name)
    return None


def _trouble(limits: Limits, sight: Sight) -> str:
    found = (
        ("times the latency before", sight.latency_ratio, limits.max_latency_ratio),
        ("of the frames fail", sight.error_share, limits.max_error_share),
        ("standard deviations of drift", sight.drift, limits.max_drift),
    )
    for words, value, limit in found:
        if value is not None and value > limit:
            return f"{value:.3g} {words}, {limit:g} is allowed"
    return ""


def _reason_to_abort(plan: Plan, progress: Progress) -> str:
    failed = [(name, board) for name, board in progress.boards.items() if board.state == "failed"]
    told = len(progress.boards)
    allowed = math.floor(plan.limits.max_failed * told)
    if len(failed) <= allowed:
        return ""
    name, board = failed[-1]
    return f"{len(failed)} of {told} boards failed, {allowed} may; the last: {name}, {board.detail or board.reason}"


def _forward(plan: Plan, progress: Progress, sights: Mapping[DeviceId, Sight], now: float) -> Iterator[Entry]:
    """Tell the boards whose turn it is; when they are done, the next stage."""
    yield from _asks(plan, progress, sights, now)
    members = [str(device) for device in plan.members(progress.stage, list(sights))]
    boards = [progress.boards[name] for name in members if name in progress.boards]
    if not boards or any(board.state == "confirmed" for board in boards):
        return
    done = sum(board.state == "done" for board in boards)
    is_enough = done >= math.ceil(plan.limits.min_done * len(boards))
    if all(board.state in SETTLED for board in boards) or now - progress.stage_since > plan.limits.patience_s:
        if not is_enough:
            yield Entry(time=now, kind="paused", reason=_why_paused(progress, members, sights))
        elif progress.stage + 1 < len(plan.stages):
            yield Entry(time=now, kind="stage", stage=progress.stage + 1)
        else:  # who is still away gets it from the channel that it follows
            yield Entry(time=now, kind="finished")


def _why_paused(progress: Progress, members: list[str], sights: Mapping[DeviceId, Sight]) -> str:
    told = [name for name in members if name in progress.boards]
    open_ = [name for name in told if progress.boards[name].state == "asked"]
    said = next((f"; {name} said: {no}" for name in open_ if (no := sights[parse_device(name)].no)), "")
    done = sum(progress.boards[name].state == "done" for name in told)
    return (
        f"{done} of {len(told)} boards are done with stage {progress.stage + 1}, {len(open_)} have not taken it{said}"
    )


def _asks(plan: Plan, progress: Progress, sights: Mapping[DeviceId, Sight], now: float) -> Iterator[Entry]:
    for device in plan.members(progress.stage, list(sights)):
        name, sight, board = str(device), sights[device], progress.boards.get(str(device))
        if board is None and sight.is_online and not _has_newer(plan, sight):
            yield _ask(plan, name, 1, now)
        elif board and board.state == "asked" and _is_to_be_asked_again(board, sight, now):
            yield _ask(plan, name, _number(board) + 1, now)


def _has_newer(plan: Plan, sight: Sight) -> bool:
    return sight.release is not None and sight.release >= plan.release


def _is_to_be_asked_again(board: Board, sight: Sight, now: float) -> bool:
    return sight.is_online and not sight.installed and _is_due_again(board, sight, now)


def _is_due_again(board: Board, sight: Sight, now: float) -> bool:
    return bool(sight.no or now > board.expires) and now - board.since >= ATTEMPTS_APART_S


def _ask(plan: Plan, name: str, number: int, now: float) -> Entry:
    command = command_id(plan, "update", name, number)
    return Entry(time=now, kind="asked", device=name, command=command, expires=now + plan.limits.patience_s)


def _reverts(plan: Plan, progress: Progress, sights: Mapping[DeviceId, Sight], now: float) -> Iterator[Entry]:
    """Every board that was told goes back, as soon as it is seen to have the release."""
    for name, board in list(progress.boards.items()):
        sight = sights.get(parse_device(name))
        if sight is None:
            continue
        if sight.release != plan.release:
            if board.state in ("confirmed", "done", "failed", "revert"):
                yield Entry(time=now, kind="reverted", device=name)
        elif board.state != "revert":
            if board.state != "stuck":
                yield _revert(plan, name, board, now)
        elif sight.is_online and _is_due_again(board, sight, now):
            if sight.no and _number(board) >= MAX_REVERTS:
                yield Entry(time=now, kind="stuck", device=name, reason="rollback", detail=sight.no)
            else:
                yield _revert(plan, name, board, now)


def _revert(plan: Plan, name: str, board: Board, now: float) -> Entry:
    number = _number(board) + 1 if board.state in ("revert", "reverted") else 1
    command = command_id(plan, "rollback", name, number)
    return Entry(time=now, kind="revert", device=name, command=command, expires=now + plan.limits.patience_s)


def _number(board: Board) -> int:
    """Of the last command."""
    return int(board.command.rpartition(".")[2])


def _copied(progress: Progress) -> Progress:
    return replace(progress, boards={name: replace(board) for name, board in progress.boards.items()})
