"""A board's spool in memory, with the rules of the agent's (`device/spool.py`): bounded by bytes and age, drops counted.

It outlives a simulated reboot, as the file on a board's disk does. What was acknowledged is kept for `KEEP_S` seconds and
sent again after a reconnect, because a broker that is killed may lose what it has acknowledged.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from host.simulate.ledger import Boot

LOW, HIGH, URGENT = 0, 1, 2
KEEP_S = 30.0
KEPT_BYTES = 1 << 20
KEPT_SHARE = 8


@dataclass(slots=True)
class Message:
    """One message: `kind` is its topic's last level; a reply has neither boot nor number."""

    id: int
    kind: str
    payload: bytes
    priority: int
    created: float
    boot: Boot | None = None
    sequence: int = 0
    is_cut: bool = False  # the link is lost when it is sent first, before its acknowledgement
    acknowledged: float = 0.0


class Spool:
    """What waits for the broker, oldest first.

    Args:
        max_bytes: of payloads.
        max_age_s: of a message.
        clock: seconds that never jump.
    """

    def __init__(self, *, max_bytes: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self._max_bytes, self._max_age_s, self._clock = max_bytes, max_age_s, clock
        self._lanes: dict[int, dict[int, Message]] = {LOW: {}, HIGH: {}, URGENT: {}}
        self._kept: deque[Message] = deque()
        self._kept_bytes = 0
        self._last_id = 0
        self.bytes = 0
        self.dropped = 0

    @property
    def depth(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(
        self,
        kind: str,
        payload: bytes,
        *,
        priority: int,
        boot: Boot | None = None,
        sequence: int = 0,
        is_cut: bool = False,
    ) -> None:
        """Store a message; what no longer fits is dropped, the least urgent first and of those the oldest."""
        self._last_id += 1
        self._add(Message(self._last_id, kind, payload, priority, self._clock(), boot, sequence, is_cut))
        self._drop_old()
        while self.bytes > self._max_bytes:
            lane = next(lane for lane in self._lanes.values() if lane)
            self.drop(next(iter(lane.values())))

    def pending(self, after: int, limit: int, *, are_replies: bool) -> list[Message]:
        """The oldest messages with a higher id: replies, or all others in their order."""
        if are_replies:
            found = [message for message in self._lanes[URGENT].values() if message.id > after]
            return found[:limit]
        lanes = [[m for m in self._lanes[priority].values() if m.id > after] for priority in (LOW, HIGH)]
        return sorted(lanes[0] + lanes[1], key=lambda message: message.id)[:limit]

    def acknowledge(self, message: Message) -> None:
        """The broker has taken a message: it waits no more, and is kept for `resend`."""
        if not self._remove(message):  # dropped meanwhile
            return
        if message.priority < URGENT:
            message.acknowledged = self._clock()
            self._kept.append(message)
            self._kept_bytes += len(message.payload)
        self._forget_kept()

    def resend(self) -> None:
        """Have what was acknowledged lately sent again, before all else."""
        self._forget_kept()
        for message in self._kept:
            self._add(message)
        self._kept.clear()
        self._kept_bytes = 0
        for priority in (LOW, HIGH):
            self._lanes[priority] = dict(sorted(self._lanes[priority].items()))

    def _add(self, message: Message) -> None:
        self._lanes[message.priority][message.id] = message
        self.bytes += len(message.payload)

    def _remove(self, message: Message) -> bool:
        if self._lanes[message.priority].pop(message.id, None) is None:
            return False
        self.bytes -= len(message.payload)
        return True

    def drop(self, message: Message) -> None:
        """Delete a message, for want of room or because no broker will take it, and count it."""
        if not self._remove(message):
            return
        self.dropped += 1
        if message.boot:
            message.boot.dropped.add(message.sequence)

    def _drop_old(self) -> None:
        oldest = self._clock() - self._max_age_s
        for lane in self._lanes.values():
            while lane and (first := next(iter(lane.values()))).created < oldest:
                self.drop(first)

    def _forget_kept(self) -> None:
        oldest, limit = self._clock() - KEEP_S, min(KEPT_BYTES, self._max_bytes // KEPT_SHARE)
        while self._kept and (self._kept[0].acknowledged < oldest or self._kept_bytes > limit):
            self._kept_bytes -= len(self._kept.popleft().payload)
