"""What one board numbered, sent, saw acknowledged and dropped, by boot and sequence number: what a monitor is compared with."""

from dataclasses import dataclass, field
from typing import Any

from host.simulate.ranges import Ranges


@dataclass(slots=True)
class Boot:
    """One boot: its numbers run from 1 to `last`."""

    boot: str
    last: int = 0
    sent: Ranges = field(default_factory=Ranges)
    acknowledged: Ranges = field(default_factory=Ranges)
    dropped: Ranges = field(default_factory=Ranges)

    def next_number(self) -> int:
        self.last += 1
        return self.last

    def lost(self) -> Ranges:
        """What was dropped and never acknowledged. A copy that is kept for a killed broker may be dropped as well."""
        lost = Ranges()
        for sequence in self.dropped:
            if sequence not in self.acknowledged:
                lost.add(sequence)
        return lost

    @property
    def waiting(self) -> int:
        """How many were numbered and are neither acknowledged nor dropped."""
        return self.last - len(self.acknowledged) - len(self.lost())

    def table(self) -> dict[str, Any]:
        return {
            "boot": self.boot,
            "last": self.last,
            "sent": self.sent.to_list(),
            "acknowledged": self.acknowledged.to_list(),
            "dropped": self.lost().to_list(),
        }


COUNTED = ("numbered", "sent", "acknowledged", "dropped", "waiting")
ALSO_COUNTED = ("boots", "resent", "connections", "births", "commands", "replies")


@dataclass(slots=True)
class Ledger:
    """All boots of one board, and how often it connected, was born, was told something and answered."""

    boots: list[Boot] = field(default_factory=list)
    resent: int = 0
    connections: int = 0
    births: int = 0
    commands: int = 0
    replies: int = 0

    def begin(self, boot: str) -> Boot:
        self.boots.append(Boot(boot))
        return self.boots[-1]

    def totals(self) -> dict[str, int]:
        return {
            "numbered": sum(boot.last for boot in self.boots),
            "sent": sum(len(boot.sent) for boot in self.boots),
            "acknowledged": sum(len(boot.acknowledged) for boot in self.boots),
            "dropped": sum(len(boot.lost()) for boot in self.boots),
            "waiting": sum(boot.waiting for boot in self.boots),
            "boots": len(self.boots),
            "resent": self.resent,
            "connections": self.connections,
            "births": self.births,
            "commands": self.commands,
            "replies": self.replies,
        }

    def table(self) -> dict[str, Any]:
        return {"totals": self.totals(), "boots": [boot.table() for boot in self.boots]}


def add_totals(tables: list[dict[str, int]]) -> dict[str, int]:
    """The sums of what several boards, or several processes, counted."""
    return {name: sum(table[name] for table in tables) for name in (*COUNTED, *ALSO_COUNTED)}
