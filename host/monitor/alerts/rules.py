"""When to tell a person: rules in TOML.

    webhook = "https://ops.example/hooks/fieldvit"   # gets CloudEvents; without it, page and metrics alone tell
    token_file = "hook.token"                        # its first line goes along as a bearer token
    group_s = 30                                     # what comes within this time is told together
    repeat_s = 14400                                 # what lasts is told again

    [[rule]]
    name = "board-away"
    when = "offline"            # see KINDS
    for_s = 600                 # it must last so long
    only = ["greenhouse/*"]     # patterns of SITE/DEVICE; all boards without it
    severity = "critical"       # or "warning"

    [[rule]]
    name = "took-a-model-back"
    when = "event"
    events = ["rolled-back"]

Without a file, `DEFAULT` is used.
"""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit

from device.contract.messages import EVENT_KINDS
from device.contract.records import from_table
from device.contract.topics import DeviceId, is_id
from host.errors import MonitorError

KINDS = {
    "offline": None,
    "latency": "latency/p99",
    "drift": "drift",
    "errors": "errors",
    "temperature": "temperature",
    "spool": "spool/depth",
    "dropped": "spool/dropped",
    "event": None,
    "certificate": None,
}
"""What a rule may look at, and the telemetry that it is. `offline`: not online, or silent. `event`: one of `events` came,
for `for_s` seconds. `certificate`: days until it expires, of a site's boards and broker."""
SEVERITIES = ("warning", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One reason to tell. `above` is in the unit of the telemetry contract; of `certificate`, days, and below."""

    name: str
    when: str
    above: float = 0.0
    for_s: float = 0.0
    only: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    severity: str = "warning"

    def __post_init__(self) -> None:
        if not is_id(self.name):
            raise MonitorError(f"alerts: rule {self.name!r:.100}: a name has letters, digits, - and _")
        if self.when not in KINDS:
            raise MonitorError(f"alerts: rule {self.name}: when {self.when!r} is unknown; one of {', '.join(KINDS)}")
        if self.severity not in SEVERITIES:
            raise MonitorError(f"alerts: rule {self.name}: severity must be {' or '.join(SEVERITIES)}")
        unknown = [kind for kind in self.events if kind not in EVENT_KINDS]
        if unknown or bool(self.events) != (self.when == "event"):
            wrong = f"{unknown[0]!r} is no event" if unknown else "`events` goes with when = 'event', and with it alone"
            raise MonitorError(f"alerts: rule {self.name}: {wrong}; events are {', '.join(EVENT_KINDS)}")
        if self.for_s < 0:
            raise MonitorError(f"alerts: rule {self.name}: for_s must be 0 or more, got {self.for_s}")

    def is_for(self, device: DeviceId) -> bool:
        return not self.only or any(fnmatchcase(str(device), pattern) for pattern in self.only)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertConfig:
    """The file."""

    rule: tuple[Rule, ...] = ()
    webhook: str = ""
    token_file: str = ""
    group_s: float = 30.0
    repeat_s: float = 14400.0

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rule]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise MonitorError(f"alerts: two rules are named {doubled[0]}; a name is used once")
        if self.webhook and urlsplit(self.webhook).scheme not in ("http", "https"):
            raise MonitorError("alerts: webhook must begin with https:// or http://")
        if not (self.group_s > 0 and self.repeat_s > 0):
            raise MonitorError("alerts: group_s and repeat_s must be above 0")


DEFAULT = AlertConfig(
    rule=(
        Rule(name="board-away", when="offline", for_s=600),
        Rule(name="took-a-model-back", when="event", events=("rolled-back",), for_s=3600, severity="critical"),
        Rule(name="drift", when="drift", above=1.0, for_s=1800),
        Rule(name="hot", when="temperature", above=80, for_s=300),
        Rule(name="messages-wait", when="spool", above=5000, for_s=900),
        Rule(name="certificate", when="certificate", above=14, severity="critical"),
    )
)


def load_alerts(path: Path | None) -> AlertConfig:
    """Read a file of rules; MonitorError names what is wrong with it."""
    if path is None:
        return DEFAULT
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MonitorError(f"{path}: cannot be read ({error}); see 'fieldvit monitor --help'") from error
    return from_table(AlertConfig, table, where=str(path), error=MonitorError)
