"""Which alerts fire, and what to tell of them: together, once, again while they last, and when they are over.

A condition fires when it has held for its rule's time, and is over when it has not held for as long, or `CALM_S`: a value
at the limit does not ring at each crossing. What begins or ends within `group_s` is one notice for each rule, however
many boards it concerns, so a broker that goes away rings once and not a thousand times.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from host.monitor.alerts.rules import AlertConfig, Rule

CALM_S = 60.0
BEGUN, OVER = "firing", "resolved"

Conditions = Mapping[tuple[str, str], str]
"""What holds now: (rule, SITE/DEVICE) to words about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One thing to tell: a rule began to fire, goes on, or is over, for these boards."""

    rule: Rule
    kind: str
    boards: tuple[str, ...]
    text: str
    time: float
    is_repeated: bool = False


@dataclass(slots=True)
class Alert:
    """One rule on one board. `told` is what was told last: "" | firing."""

    since: float
    last: float
    text: str
    is_firing: bool = False
    told: str = ""


@dataclass(slots=True)
class Tracker:
    """All alerts. What `state` gives, `restore` takes, so that a restart tells nothing twice."""

    config: AlertConfig
    alerts: dict[tuple[str, str], Alert] = field(default_factory=dict)
    last_told: dict[str, float] = field(default_factory=dict)

    def look(self, conditions: Conditions, *, now: float) -> list[Notice]:
        """Take in what holds now; returns what is to be told, each until `told` says that it was."""
        rules = {rule.name: rule for rule in self.config.rule}
        for key, text in conditions.items():
            alert = self.alerts.setdefault(key, Alert(since=now, last=now, text=text))
            alert.last, alert.text = now, text
            alert.is_firing |= now - alert.since >= _must_last_s(rules[key[0]])
        for key, alert in list(self.alerts.items()):
            if key[0] not in rules or (key not in conditions and not self._still_counts(alert, rules[key[0]], now)):
                if alert.told == BEGUN and key[0] in rules:
                    alert.is_firing = False
                else:
                    del self.alerts[key]
        return [notice for rule in self.config.rule for notice in self._notices(rule, now)]

    def told(self, notice: Notice) -> None:
        """Somebody has heard it."""
        self.last_told[notice.rule.name] = notice.time
        for board in notice.boards:
            alert = self.alerts.get((notice.rule.name, board))
            if alert and notice.kind == BEGUN:
                alert.told = BEGUN
            elif alert and not alert.is_firing:
                del self.alerts[notice.rule.name, board]

    def firing(self) -> dict[str, int]:
        """How many boards each rule fires for."""
        counts = {rule.name: 0 for rule in self.config.rule}
        for (name, _), alert in self.alerts.items():
            counts[name] += alert.is_firing
        return counts

    def state(self) -> dict[str, Any]:
        """What a restart needs to know."""
        alerts = [
            [*key, alert.since, alert.last, alert.text, alert.is_firing, alert.told]
            for key, alert in self.alerts.items()
        ]
        return {"alerts": alerts, "last_told": self.last_told}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; ValueError, KeyError or TypeError where it is none."""
        self.alerts = {(rule, board): Alert(*rest) for rule, board, *rest in state["alerts"]}
        self.last_told = {str(name): float(moment) for name, moment in state["last_told"].items()}

    def _still_counts(self, alert: Alert, rule: Rule, now: float) -> bool:
        return alert.is_firing and now - alert.last < max(CALM_S, rule.for_s if rule.when == "event" else 0)

    def _notices(self, rule: Rule, now: float) -> Iterable[Notice]:
        mine = {board: alert for (name, board), alert in self.alerts.items() if name == rule.name}
        new = sorted(board for board, alert in mine.items() if alert.is_firing and not alert.told)
        over = sorted(board for board, alert in mine.items() if alert.told and not alert.is_firing)
        old = sorted(board for board, alert in mine.items() if alert.is_firing and alert.told)
        since_s = now - self.last_told.get(rule.name, float("-inf"))
        if since_s < self.config.group_s:
            return
        if new:
            yield Notice(rule=rule, kind=BEGUN, boards=tuple(new), text=_words(mine, new), time=now)
        if over:
            yield Notice(rule=rule, kind=OVER, boards=tuple(over), text=_words(mine, over), time=now)
        if old and not new and not over and since_s >= self.config.repeat_s:
            yield Notice(rule=rule, kind=BEGUN, boards=tuple(old), text=_words(mine, old), time=now, is_repeated=True)


def _must_last_s(rule: Rule) -> float:
    return 0.0 if rule.when == "event" else rule.for_s


def _words(alerts: Mapping[str, Alert], boards: list[str]) -> str:
    first = f"{boards[0]}: {alerts[boards[0]].text}"
    return first if len(boards) == 1 else f"{len(boards)} boards; {first}"
