"""The MQTT connection: sends what lies in the spool, receives commands. The only module that imports paho.

One thread owns the connection, so inference never waits for the network. Each attempt uses a new paho client and no
client-side session: what was not acknowledged, and what was just before, is still in the spool and is sent again (the
receiver drops repeated sequence numbers), so no message is remembered in two places. The session on the broker is persistent: commands wait there.

MQTT 5 first: its reason codes tell a message that the broker took from one that it threw away, and its limits (receive
maximum, packet size) are kept. A broker that refuses 5 is asked with 3.1.1 from then on. One that hangs up or says nothing
is asked with 3.1.1 once, and with 5 again at the next connect, because one that was just stopped does the same; after
`GUESSES` such connects it is taken for one that knows no 5. No message expiry: what a broker forgets by itself would be
lost without being counted. Replies go first: they carry no sequence number, and whoever asked waits for them. All else
goes in its order.

What a broker took though nobody subscribes is not delivered: a broker that is killed may come back without the monitor's
session, and the board may be back before the monitor. MQTT 5 tells, so such a message stays in the spool, and after each
connect one message goes ahead of the others to find out. MQTT 3.1.1 cannot tell.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device.config import BrokerConfig
from device.contract.errors import BrokerError
from device.contract.messages import MAX_PAYLOAD_BYTES
from device.contract.record import record
from device.contract.topics import DeviceId
from device.credentials import read_password, tls_context
from device.flight import MAX_MESSAGES, Flight
from device.spool import Message, Spool, SpoolError

CONNECT_TIMEOUT_S = 5.0
NEVER = 0xFFFFFFFF
"""When a broker forgets the session, and so the commands, of a board that is away: as with MQTT 3.1.1.

Any other time is a danger to mosquitto before 2.1: when it reads its files again, as after a revocation, it lists those
who are away with such a time twice, frees them once, and ends or goes on with memory that is somebody else's.
"""
WILL_DELAY_S = 5
"""A board that is back so soon is not reported as gone."""
MAX_PACKET_BYTES = 4 * MAX_PAYLOAD_BYTES
"""What the broker may send us. Beyond the contract's limit, so that a command that is too large can be answered."""
BACKOFF_S = (1.0, 60.0)
TICK_S = 0.1
MAX_RESULTS = 1000

GUESSES = 2
_MQTT_5, _MQTT_311 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
_OTHER_PROTOCOL = ("Unsupported protocol version", "Protocol error")
NOBODY = "No matching subscribers"
NOBODY_S = 2.0
"""How often the oldest message is tried while nobody subscribes."""
_HOPELESS = ("Packet too large", "Payload format invalid", "Topic name invalid")
"""Why a broker will never take a message, however often it comes. Any other refusal may pass."""

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Companion:
    """Another system on the same broker: retained messages (topic, payload) for it, and one topic that it may write to.

    They are sent at each connect and announcement with QoS 0: the next one brings them again. What is retained on its
    topic is not obeyed: it would be, at each connect.
    """

    messages: Callable[[], Iterable[tuple[str, bytes]]]
    topic: str
    on_message: Callable[[bytes], None]


class OnFrame(Protocol):
    """What takes a frame's payload; it must return quickly."""

    def __call__(self, payload: bytes, *, is_retained: bool) -> None: ...


class Connection:
    """Keeps one device connected.

    Args:
        config: the broker.
        base: where the paths in `config` start.
        device: whose topics.
        spool: what to send.
        birth: gives the retained online state, asked at each connect and after `announce`.
        offline: the retained offline state: last will, and goodbye.
        on_command: gets each command's payload in this thread; it must return quickly, and durably.
        companion: another system that is told of this device.
        on_frame: gets each frame's payload in this thread, and whether it was retained; None: frames are not asked for.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        base: Path,
        device: DeviceId,
        spool: Spool,
        birth: Callable[[], bytes],
        offline: bytes,
        on_command: Callable[[bytes], None],
        companion: Companion | None = None,
        on_frame: OnFrame | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._config, self._base, self._device, self._spool = config, base, device, spool
        self._birth, self._offline, self._on_command, self._on_frame = birth, offline, on_command, on_frame
        self._rng = rng or random.Random()  # spreads a fleet's reconnects; nothing secret
        self._companion, self._companion_due = companion, threading.Event()
        self._companion_client: paho.Client | None = None
        self._stop = threading.Event()
        self._announce = threading.Event()
        self.thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._flight = Flight()
        self._last_sent = self._last_reply = 0
        self._scout: int | None = None  # the spool's id of the message that is to find out whether anybody subscribes
        self._is_heard = False
        self._next_scout = 0.0
        self._max_packet_bytes: int | None = None  # the broker's
        self._is_refused = False
        self._version = _MQTT_5
        self._is_version_known = False
        self._guesses = 0  # connects with 3.1.1 in a row, where 5 got no answer
        self._results: deque[bytes] = deque(maxlen=MAX_RESULTS)
        self.results_dropped = 0
        self.is_connected = False
        self._frame_mid: int | None = None
        self._trouble = ""
        self._refusal = ""
        create_client(config, base, "", protocol=_MQTT_5)  # a missing file is a mistake to report at the start

    def start(self) -> None:
        self.thread.start()

    def stop(self, flush_s: float) -> None:
        """Send what is spooled for up to `flush_s`, say goodbye and disconnect."""
        deadline = time.monotonic() + flush_s
        while self.is_connected and self._spool.depth and time.monotonic() < deadline:
            time.sleep(TICK_S / 2)
        self._stop.set()
        self.thread.join(timeout=flush_s)  # a hanging connect must not hold the shutdown up

    @property
    def protocol(self) -> str:
        """What is or will be spoken with the broker."""
        return "MQTT 5" if self._version is _MQTT_5 else "MQTT 3.1.1"

    def announce(self) -> None:
        """Publish the state again, soon."""
        self._companion_due.set()
        self._announce.set()

    def publish_result(self, payload: bytes) -> None:
        """Send at most once, soon, and only while connected; the oldest that the network is too slow for is dropped.

        It is only queued here: paho must not be called from two threads, its packets would mix on the wire.
        """
        if self.is_connected:
            self.results_dropped += len(self._results) == MAX_RESULTS
            self._results.append(payload)

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                self._session()
            except (OSError, SpoolError) as error:
                self._report(f"{self._config.hostname}:{self._config.port} cannot be reached ({error})")
            except Exception:  # this thread's outer loop: whatever a broker sends, inference goes on
                log.exception("mqtt: unexpected error; connecting again")
            finally:
                self.is_connected = False
                self.results_dropped += len(self._results)
                self._results.clear()
            if self._is_refused and self._version is _MQTT_5:
                self._version = _MQTT_311
                continue
            if not self._is_version_known:
                self._version = _MQTT_5
            failures = 0 if time.monotonic() - started > BACKOFF_S[1] else failures + 1
            self._stop.wait(backoff_s(failures, self._rng))

    def _session(self) -> None:
        """Connect and serve until the connection is lost or the agent stops."""
        self._last_sent = self._last_reply = 0
        self._scout, self._is_heard, self._next_scout = None, False, 0.0
        self._refusal, self._is_refused = "", False
        name = f"fieldvit-{self._device.site}-{self._device.device}"
        client = create_client(self._config, self._base, name, protocol=self._version, is_persistent=True)
        client.on_connect, client.on_message, client.on_publish = self._on_connect, self._on_message, self._on_publish
        client.on_disconnect, client.on_subscribe = self._on_disconnect, self._on_subscribe
        client.will_set(self._device.topic("state"), self._offline, qos=1, retain=True, properties=self._will())
        connect(client, self._config, self._version, is_persistent=True)
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while not self._stop.is_set():
            if client.loop(timeout=TICK_S) != paho.MQTT_ERR_SUCCESS:
                self._is_refused |= not (self.is_connected or self._refusal)  # hung up without a word
                self._report(self._refusal or "the broker closed the connection")
                return
            if self.is_connected and self._refusal:  # it throws away what we send: come back later
                self._report(self._refusal)
                client.disconnect()
                return
            if self.is_connected:
                self._pump(client)
                self._tell_companion(client)
            elif time.monotonic() > deadline:
                self._is_refused = True
                self._report("the broker accepted no login in time")
                return
        if self.is_connected:
            _say_goodbye(client, self._device.topic("state"), self._offline)

    def _pump(self, client: paho.Client) -> None:
        if self._announce.is_set() and self._flight.room():
            self._announce.clear()
            birth = self._birth()
            sent = client.publish(self._device.topic("state"), birth, qos=1, retain=True)
            self._flight.add(sent.mid, None, len(birth))
        for message in self._pending(self._last_reply, are_replies=True):
            if not (self._drop_too_large(message) or self._send(client, message)):
                return
            self._last_reply = message.id
        self._send_in_order(client)
        while self._results and not client.want_write():  # what paho holds back would pile up in memory
            client.publish(self._device.topic("result"), self._results.popleft(), qos=0)

    def _send_in_order(self, client: paho.Client) -> None:
        """Telemetry and events: one ahead, and the others once that one was heard."""
        if not self._is_heard and (self._scout is not None or time.monotonic() < self._next_scout):
            return
        for message in self._pending(self._last_sent, are_replies=False):
            is_dropped = self._drop_too_large(message)
            if not (is_dropped or self._send(client, message)):
                return
            self._last_sent = message.id
            if not (is_dropped or self._is_heard):
                self._scout = message.id
                return

    def _pending(self, after: int, *, are_replies: bool) -> list[Message]:
        room = self._flight.room()
        return self._spool.pending(after, room, are_replies=are_replies) if room else []

    def _drop_too_large(self, message: Message) -> bool:
        """Drop what is over the broker's limit for a packet, and say whether it was."""
        size = len(message.payload) + len(self._device.topic(message.kind)) + 16
        if self._max_packet_bytes is None or size <= self._max_packet_bytes:
            return False
        log.error("mqtt: a %s of %d bytes is over the broker's limit and is dropped", message.kind, size)
        self._spool.drop(message.id)
        return True

    def _send(self, client: paho.Client, message: Message) -> bool:
        """Send a message; False where it must wait."""
        topic, size = self._device.topic(message.kind), len(message.payload)
        if not self._flight.fits(size):
            return False
        sent = client.publish(topic, message.payload, qos=1)
        self._flight.add(sent.mid, message.id, size)
        return True

    def _will(self) -> Properties | None:
        if self._version is not _MQTT_5:
            return None
        properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
        properties.WillDelayInterval = WILL_DELAY_S
        return properties

    def _on_connect(
        self,
        client: paho.Client,
        _data: object,
        _flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._refusal = f"the broker refused the login ({reason})"
            self._is_refused = self._is_version_known = str(reason) in _OTHER_PROTOCOL
            return
        self._guesses = self._guesses + 1 if self._version is _MQTT_311 else 0
        self._is_version_known |= self._guesses >= GUESSES
        self._flight.reset(getattr(properties, "ReceiveMaximum", None))
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self._spool.resend()
        client.subscribe(self._device.topic("command"), qos=1)
        if self._on_frame:
            _, self._frame_mid = client.subscribe(self._device.topic("frame"), qos=0)  # nothing is kept for later
        else:  # it may have asked for them before
            client.unsubscribe(self._device.topic("frame"))
        self._announce.set()
        self.is_connected = True
        self._trouble = ""
        log.info("connected to %s:%d with %s", self._config.hostname, self._config.port, self.protocol)

    def _on_disconnect(
        self, _client: paho.Client, _data: object, flags: paho.DisconnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._refusal = self._refusal or f"the broker closed the connection ({reason})"

    def _on_subscribe(
        self, _client: paho.Client, _data: object, mid: int, reasons: list[ReasonCode], _properties: object
    ) -> None:
        for reason in reasons:
            if reason.is_failure:  # what this board has to say goes on
                what = "frame" if mid == self._frame_mid else "command"
                log.error("mqtt: the broker lets no %s through (%s); check its access rules", what, reason)

    def tell_companion(self) -> None:
        """Have the companion's messages made and sent again, soon."""
        self._companion_due.set()

    def _tell_companion(self, client: paho.Client) -> None:
        if self._companion is None or not (self._companion_due.is_set() or client is not self._companion_client):
            return
        self._companion_due.clear()
        if client is not self._companion_client:
            client.subscribe(self._companion.topic, qos=1)
            self._companion_client = client
        for topic, payload in self._companion.messages():
            client.publish(topic, payload, qos=0, retain=True)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        if message.topic == self._device.topic("command"):  # amqtt also delivers retained messages nobody asked for
            self._on_command(bytes(message.payload))
        elif self._on_frame and message.topic == self._device.topic("frame"):
            self._on_frame(bytes(message.payload), is_retained=message.retain)
        elif self._companion and message.topic == self._companion.topic and not message.retain:
            self._companion.on_message(bytes(message.payload))

    def _on_publish(
        self, _client: paho.Client, _data: object, mid: int, reason: ReasonCode, _properties: Properties
    ) -> None:
        message_id = self._flight.land(mid)
        if message_id is None:
            return
        if str(reason) == NOBODY:
            self._wait_for_a_listener(message_id)
        elif not reason.is_failure:
            self._is_heard |= message_id == self._scout
            self._spool.acknowledge(message_id)
        elif str(reason) in _HOPELESS:
            log.error("mqtt: the broker will not take a message (%s); it is dropped", reason)
            self._spool.drop(message_id)
            self._scout = None if message_id == self._scout else self._scout
        else:  # its rules or its quota may change; the message waits in the spool
            self._refusal = f"the broker refused a message ({reason}); check its access rules"

    def _wait_for_a_listener(self, message_id: int) -> None:
        """Keep a message that nobody heard, and begin again with the oldest after a while."""
        if self._is_heard or self._next_scout == 0.0:
            log.warning("mqtt: nobody subscribes to what this board has to say; messages wait in the spool")
        self._is_heard, self._scout, self._last_sent = False, None, 0
        self._next_scout = time.monotonic() + NOBODY_S

    def _report(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("mqtt: %s; trying again, messages wait in the spool", trouble)
        self._trouble = trouble


def create_client(
    config: BrokerConfig, base: Path, client_id: str, *, protocol: MQTTProtocolVersion, is_persistent: bool = False
) -> paho.Client:
    """A paho client with login and TLS as configured, not connected yet; ConfigError when a file is missing or wrong."""
    clean_session = None if protocol is _MQTT_5 else not is_persistent
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id, clean_session, protocol=protocol)
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.max_inflight_messages_set(2 * MAX_MESSAGES)  # ours is the bound; paho must not hold anything back
    if config.username is not None:
        client.username_pw_set(config.username, read_password(config, base))
    if config.ca_file is not None:
        client.tls_set_context(tls_context(config, base))
    return client


def connect(client: paho.Client, config: BrokerConfig, protocol: MQTTProtocolVersion, *, is_persistent: bool) -> None:
    """Open the connection and ask for the login; OSError when the broker cannot be reached."""
    if protocol is not _MQTT_5:
        client.connect(config.hostname, config.port, config.keepalive_s)
        return
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = NEVER if is_persistent else 0
    properties.ReceiveMaximum = MAX_MESSAGES
    properties.MaximumPacketSize = MAX_PACKET_BYTES
    client.connect(
        config.hostname, config.port, config.keepalive_s, clean_start=not is_persistent, properties=properties
    )


def probe(config: BrokerConfig, base: Path) -> float | None:
    """Log in once and leave; returns when the broker's certificate expires, in Unix seconds, or None without TLS.

    Raises:
        BrokerError: the broker cannot be reached or refuses the login.
    """
    address = f"{config.hostname}:{config.port}"
    try:
        reason, expires = _login(config, base, _MQTT_5)
        if reason is None or str(reason) in _OTHER_PROTOCOL:
            reason, expires = _login(config, base, _MQTT_311)
    except OSError as error:
        raise BrokerError(
            f"{address} cannot be reached ({error}); check broker.hostname, port and the network"
        ) from error
    if reason is None or reason.is_failure:
        answer = str(reason) if reason else "no answer"
        advice = "check broker.username, password_file, ca_file and cert_file"
        raise BrokerError(f"{address} refused the login ({answer}); {advice}")
    return expires


def _login(config: BrokerConfig, base: Path, protocol: MQTTProtocolVersion) -> tuple[ReasonCode | None, float | None]:
    """The broker's answer to a login, or None when it hung up or said nothing; and when its certificate expires."""
    outcome: list[ReasonCode] = []
    name = f"fieldvit-doctor-{random.randrange(1 << 32):08x}"
    # A broker may take the certificate's name for our client id, and us for the agent: its session must outlive this.
    is_persistent = config.cert_file is not None
    client = create_client(config, base, name, protocol=protocol, is_persistent=is_persistent)
    client.manual_ack_set(True)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: outcome.append(reason)
    connect(client, config, protocol, is_persistent=is_persistent)
    expires = _certificate_end(client.socket())
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while not outcome and time.monotonic() < deadline and client.loop(timeout=TICK_S) == paho.MQTT_ERR_SUCCESS:
        pass
    client.disconnect()
    return (outcome[0] if outcome else None), expires


def _certificate_end(connection: object) -> float | None:
    """When the certificate at the other end expires, in Unix seconds; None without TLS."""
    import ssl  # here: a board that talks to a broker beside it needs none

    if not isinstance(connection, ssl.SSLSocket) or not (certificate := connection.getpeercert()):
        return None
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


def backoff_s(failures: int, rng: random.Random) -> float:
    """Seconds until the next attempt: doubling from the first to the last of `BACKOFF_S`, half of it by chance."""
    ceiling = min(BACKOFF_S[1], BACKOFF_S[0] * float(2 ** max(0, min(failures, 16) - 1)))
    return ceiling * rng.uniform(0.5, 1.0)


def _say_goodbye(client: paho.Client, topic: str, offline: bytes) -> None:
    sent = client.publish(topic, offline, qos=1, retain=True)
    deadline = time.monotonic() + 1.0
    while not sent.is_published() and time.monotonic() < deadline:
        if client.loop(timeout=TICK_S) != paho.MQTT_ERR_SUCCESS:
            return
    client.disconnect()
