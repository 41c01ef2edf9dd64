"""Keeps one simulated board connected, by the rules of the agent's `device/mqtt.py`.

A retained birth after each connect; replies first, all else in order; a few messages under way; what was acknowledged lately
is sent again after a reconnect; and what nobody subscribes to stays in the spool, with one message ahead to find out.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable

from paho.mqtt.enums import MQTTProtocolVersion

from device.contract.topics import DeviceId
from host.monitor.broker import BrokerAddress
from host.simulate.ledger import Ledger
from host.simulate.link import MAX_MESSAGES, NOBODY, Link
from host.simulate.spool import Message, Spool

MAX_FLIGHT_BYTES = 512 << 10
NOBODY_S = 2.0
"""How often the oldest message is tried while nobody subscribes."""
GOODBYE_S = 2.0
HOPELESS = ("Packet too large", "Payload format invalid", "Topic name invalid")
"""Why a broker will never take a message, however often it comes."""


class Connection:
    """One board's way to the broker.

    Args:
        device: whose topics.
        broker: where it is.
        protocol: MQTT 5 or 3.1.1.
        spool: what to send.
        ledger: where it is counted.
        birth: gives the retained online state.
        offline: gives the retained offline state of this boot: last will, and goodbye.
        on_command: gets each command's payload.
        on_trouble: told why there is no connection, at each attempt.
        backoff_s: the first and the last pause between two attempts.
        rng: of the pauses.
    """

    def __init__(
        self,
        device: DeviceId,
        broker: BrokerAddress,
        protocol: MQTTProtocolVersion,
        *,
        spool: Spool,
        ledger: Ledger,
        birth: Callable[[], bytes],
        offline: Callable[[], bytes],
        on_command: Callable[[bytes], None],
        on_trouble: Callable[[str], None],
        backoff_s: tuple[float, float],
        rng: random.Random,
    ) -> None:
        self._device, self._broker, self._protocol = device, broker, protocol
        self._spool, self._ledger = spool, ledger
        self._birth, self._offline = birth, offline
        self._on_command, self._on_trouble = on_command, on_trouble
        self._backoff_s, self._rng = backoff_s, rng
        self._topics = {
            kind: device.topic(kind) for kind in ("state", "telemetry", "event", "result", "command", "reply")
        }
        self._link: Link | None = None
        self._is_reachable, self._is_woken, self._is_answer_new = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._is_reachable.set()
        self._begin()

    def _begin(self, receive_maximum: int | None = None) -> None:
        self._limit = min(MAX_MESSAGES, receive_maximum or MAX_MESSAGES)
        self._flight: dict[int, tuple[Message | None, int]] = {}  # packet id -> message (None: a birth), bytes
        self._flight_bytes = 0
        self._last_sent = self._last_reply = 0
        self._scout: Message | None = None
        self._is_heard, self._is_scout_waiting = False, False
        self._is_birth_due = True

    @property
    def is_connected(self) -> bool:
        return self._link is not None

    async def settle(self, *, or_unheard: bool) -> None:
        """Wait until all that was said has been acknowledged, or until it is known that nobody subscribes to it."""
        while not (self._is_idle() or (or_unheard and self._link is not None and self._is_scout_waiting)):
            self._is_answer_new.clear()
            await self._is_answer_new.wait()

    def _is_idle(self) -> bool:
        return self._link is not None and not (self._flight or self._spool.depth or self._is_birth_due)

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            await self._is_reachable.wait()
            started = loop.time()
            try:
                await self._session()
            except OSError as error:
                self._on_trouble(str(error))
            failures = 0 if loop.time() - started > self._backoff_s[1] else failures + 1
            self._is_woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s(failures)):
                    await self._is_woken.wait()

    def lose(self) -> None:
        """Lose the link, and find none until `find`."""
        self._is_reachable.clear()
        self._cut()

    def find(self) -> None:
        """There is a link again."""
        self._is_reachable.set()
        self._is_woken.set()

    def announce(self) -> None:
        """Have the birth published again."""
        self._is_birth_due = True
        self.pump()

    def publish_result(self, payload: bytes) -> None:
        """Send an inference result; lost where there is no connection, as on a board."""
        if self._link:
            self._link.publish(self._topics["result"], payload, qos=0)

    def beat(self) -> None:
        if self._link:
            self._link.beat()

    def pump(self) -> None:
        """Send what may be sent now."""
        if self._link is None:
            return
        if self._is_birth_due and self._room():
            self._is_birth_due = False
            birth = self._birth()
            self._add(self._link.publish(self._topics["state"], birth, retain=True), None, len(birth))
            self._ledger.births += 1
        for message in self._pending(self._last_reply, are_replies=True):
            if not self._send(message):
                return
            self._last_reply = message.id
        self._send_in_order()

    async def leave(self) -> None:
        """Say goodbye, where there is a connection, and do not come back."""
        self._is_reachable.clear()
        link = self._link
        if link is None:
            return
        link.publish(self._topics["state"], self._offline(), retain=True)
        link.say_goodbye()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await link.closed.wait()

    async def _session(self) -> None:
        name = f"fieldvit-{self._device.site}-{self._device.device}"
        will = (self._topics["state"], self._offline())
        link = Link(self._broker, name, protocol=self._protocol, will=will, listener=self)
        try:
            await link.open()
            await link.closed.wait()
            if link.refusal:
                raise OSError(link.refusal)
        finally:
            if self._link is link:
                self._link = None
            link.cut()

    def is_up(self, link: Link, receive_maximum: int | None) -> None:
        """The broker took the login: begin anew."""
        self._link = link
        self._ledger.connections += 1
        self._begin(receive_maximum)
        self._spool.resend()
        link.subscribe(self._topics["command"])
        self.pump()

    def hears(self, payload: bytes) -> None:
        """A command came."""
        self._on_command(payload)

    def is_answered(self, packet: int, reason: str, *, is_failure: bool) -> None:
        """The broker took a message, or says why not."""
        message, size = self._flight.pop(packet, (None, 0))
        self._flight_bytes -= size
        if message is None:
            pass
        elif reason == NOBODY:
            self._wait_for_a_listener()
        elif not is_failure:
            self._is_heard |= message is self._scout
            if message.boot:
                message.boot.acknowledged.add(message.sequence)
            self._spool.acknowledge(message)
        elif reason in HOPELESS:
            self._spool.drop(message)
            self._scout = None if message is self._scout else self._scout
        elif self._link:
            self._link.refusal = f"the broker refused a message ({reason}); check its access rules"
            self._link.cut()
        self.pump()
        self._is_answer_new.set()

    def _wait_for_a_listener(self) -> None:
        """Keep what nobody heard, and begin again with the oldest after a while."""
        self._is_heard, self._scout, self._last_sent = False, None, 0
        if not self._is_scout_waiting:
            self._is_scout_waiting = True
            asyncio.get_running_loop().call_later(NOBODY_S, self._try_again)

    def _try_again(self) -> None:
        self._is_scout_waiting = False
        self.pump()

    def _send_in_order(self) -> None:
        """Telemetry and events: one ahead, and the others once that one was heard."""
        if not self._is_heard and (self._scout is not None or self._is_scout_waiting):
            return
        for message in self._pending(self._last_sent, are_replies=False):
            if not self._send(message):
                return
            self._last_sent = message.id
            if not self._is_heard:
                self._scout = message
                return

    def _pending(self, after: int, *, are_replies: bool) -> list[Message]:
        room = self._room()
        return self._spool.pending(after, room, are_replies=are_replies) if room else []

    def _room(self) -> int:
        return self._limit - len(self._flight) if self._flight_bytes < MAX_FLIGHT_BYTES else 0

    def _add(self, packet: int, message: Message | None, size: int) -> None:
        self._flight[packet] = (message, size)
        self._flight_bytes += size

    def _send(self, message: Message) -> bool:
        """Send a message; False where it must wait, or where the link is lost with it."""
        size = len(message.payload)
        link = self._link
        if link is None or not self._room() or (self._flight and self._flight_bytes + size > MAX_FLIGHT_BYTES):
            return False
        self._add(link.publish(self._topics[message.kind], message.payload), message, size)
        if message.boot and not message.boot.sent.add(message.sequence):
            self._ledger.resent += 1
        if message.is_cut:
            message.is_cut = False
            if self._rng.random() < 0.5:
                link.cut_when_sent()  # the broker may have it: the copy that follows must change nothing
            else:
                self._cut()  # it never left
        return True

    def _cut(self) -> None:
        if self._link:
            self._link.cut()
            self._link = None

    def _pause_s(self, failures: int) -> float:
        first, last = self._backoff_s
        ceiling = min(last, first * 2.0 ** max(0, min(failures, 16) - 1))
        return ceiling * self._rng.uniform(0.5, 1.0)
