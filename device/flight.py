"""What was sent and is not acknowledged yet: bounded by number and by bytes, so that a slow broker is never flooded."""

MAX_MESSAGES = 20
MAX_BYTES = 512 << 10


class Flight:
    """The QoS 1 messages under way on one connection, by packet id. Not for several threads."""

    def __init__(self) -> None:
        self._limit = MAX_MESSAGES
        self._sent: dict[int, tuple[int | None, int]] = {}  # packet id -> the spool's id (None: not from there), bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sent)

    def reset(self, receive_maximum: int | None) -> None:
        """Begin a connection, to a broker that takes `receive_maximum` messages at a time (None: it did not say)."""
        self._limit = min(MAX_MESSAGES, receive_maximum or MAX_MESSAGES)
        self._sent.clear()
        self._bytes = 0

    def room(self) -> int:
        """How many messages may be sent now. One always may when none is under way, however large."""
        if self._bytes >= MAX_BYTES:
            return 0
        return max(0, self._limit - len(self._sent))

    def fits(self, size: int) -> bool:
        """Whether one more message of `size` bytes may be sent now."""
        return self.room() > 0 and (not self._sent or self._bytes + size <= MAX_BYTES)

    def add(self, packet: int, message: int | None, size: int) -> None:
        """A message was sent."""
        self._sent[packet] = (message, size)
        self._bytes += size

    def land(self, packet: int) -> int | None:
        """A message was answered; returns the spool's id, or None where it is not from there or not known."""
        message, size = self._sent.pop(packet, (None, 0))
        self._bytes -= size
        return message
