"""Which rules hold for which boards, by what the store has seen of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from device.contract.topics import DeviceId
from host.monitor.alerts.rules import KINDS, Rule
from host.monitor.rows import DeviceRow, EventRow
from host.monitor.views import shown_status


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiry:
    """A certificate: whose, and when it ends, in Unix seconds."""

    owner: str
    expires: float


def conditions(
    rules: Iterable[Rule],
    rows: Iterable[DeviceRow],
    events: Iterable[tuple[DeviceId, EventRow]] = (),
    expiries: Iterable[Expiry] = (),
    *,
    now: float,
) -> dict[tuple[str, str], str]:
    """What holds now, in words.

    Args:
        rules: of the configuration.
        rows: all boards.
        events: those that arrived since the last look.
        expiries: of certificates that are known here.
        now: Unix seconds.
    """
    rows, events, expiries = list(rows), list(events), list(expiries)
    found: dict[tuple[str, str], str] = {}
    for rule in rules:
        if rule.when == "event":
            found |= _events(rule, events)
        elif rule.when == "certificate":
            found |= _certificates(rule, expiries, now)
        else:
            for row in rows:
                if rule.is_for(row.device) and (text := _of_board(rule, row, now)):
                    found[rule.name, str(row.device)] = text
    return found


def _of_board(rule: Rule, row: DeviceRow, now: float) -> str:
    status = shown_status(row, now)
    if rule.when == "offline":
        return "" if status in ("online", "unknown") else f"{status}, last heard {_ago(now - row.last_seen)} ago"
    name = KINDS[rule.when]
    value = row.latest.get(name or "")
    if status != "online" or value is None or not value > rule.above:
        return ""
    return f"{name} is {value:.4g}, above {rule.above:g}"


def _events(rule: Rule, events: list[tuple[DeviceId, EventRow]]) -> Mapping[tuple[str, str], str]:
    found = {}
    for device, row in events:
        if row.event.kind in rule.events and rule.is_for(device):
            data = row.event.data
            why = ": ".join(str(data[name]) for name in ("reason", "detail") if data.get(name))
            found[rule.name, str(device)] = f"{row.event.kind}{f' ({why[:200]})' if why else ''}"
    return found


def _certificates(rule: Rule, expiries: list[Expiry], now: float) -> Mapping[tuple[str, str], str]:
    found = {}
    for item in expiries:
        days = (item.expires - now) / 86400
        if days < rule.above and (not rule.only or item.owner in rule.only):
            found[rule.name, item.owner] = (
                f"certificate ends in {days:.1f} days" if days > 0 else "certificate has ended"
            )
    return found


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
