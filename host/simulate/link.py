"""One MQTT connection on asyncio: paho without its threads. The only module here that imports paho.

Measured before the choice, 1,000 connections of one process at 500 messages of 700 bytes a second, MQTT 5, with everything
else on the machine busy: paho driven by asyncio 258 us of processor time for a message with its acknowledgement, aiomqtt
(which wraps paho with a task and futures for each connection) 366 us, gmqtt 233 us. gmqtt keeps and sends again what was
not acknowledged by its own rules, where a board's spool decides; paho gives each acknowledgement with its reason, leaves
the socket to us, so that a link can be cut at will, and is what agents use. One file descriptor for each connection.
"""

import asyncio
import contextlib
import random
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device.contract.errors import BrokerError
from device.contract.messages import MAX_PAYLOAD_BYTES
from host.monitor.broker import BrokerAddress

MQTT_5, MQTT_311 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 60
NEVER = 0xFFFFFFFF
WILL_DELAY_S = 5
MAX_MESSAGES = 20
MAX_PACKET_BYTES = 4 * MAX_PAYLOAD_BYTES
NOBODY = "No matching subscribers"


class Listener(Protocol):
    """Who hears of a link; all calls come in the event loop's thread."""

    def is_up(self, link: "Link", receive_maximum: int | None) -> None:
        """The broker took the login."""

    def is_answered(self, packet: int, reason: str, *, is_failure: bool) -> None:
        """The broker acknowledged a message, or refused it."""

    def hears(self, payload: bytes) -> None:
        """A message came on a topic that was subscribed to."""


class Link:
    """A connection, from `open` until `closed` is set; each attempt is a new one, without memory of what was sent."""

    def __init__(
        self,
        broker: BrokerAddress,
        client_id: str,
        *,
        protocol: MQTTProtocolVersion,
        will: tuple[str, bytes],
        listener: Listener,
    ) -> None:
        """Prepare a connection; `will` is the topic and payload of the retained last will."""
        self._loop = asyncio.get_running_loop()
        self._broker, self._protocol, self._listener = broker, protocol, listener
        self._socket: Any = None
        self._is_cut_due = self._is_dead = self._is_watched = False
        self.refusal = ""
        self.closed = asyncio.Event()
        self._answered = asyncio.Event()
        self._client = _create_client(broker, client_id, protocol, is_persistent=True)
        self._client.max_inflight_messages_set(2 * MAX_MESSAGES)  # the board's bound is the lower one
        self._client.will_set(*will, qos=1, retain=True, properties=_will_properties(protocol))
        self._client.on_connect, self._client.on_disconnect = self._on_connect, self._on_disconnect
        self._client.on_publish, self._client.on_message = self._on_publish, self._on_message
        self._client.on_socket_open, self._client.on_socket_close = self._on_socket_open, self._on_socket_close
        self._client.on_socket_register_write = lambda *_: self._in_loop(self._loop.call_soon, self._write)
        self._client.on_socket_unregister_write = lambda _client, _data, opened: self._in_loop(self._unwatch, opened)

    async def open(self) -> None:
        """Connect and log in; OSError says why not."""
        await self._loop.run_in_executor(None, self._connect)  # names, TCP and TLS take their time
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._answered.wait()
        except TimeoutError:
            self.cut()
            raise OSError("the broker accepted no login in time") from None
        if self.refusal or self.closed.is_set():
            self.cut()
            raise OSError(self.refusal or "the broker closed the connection")

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int:
        """Send a message; returns its packet id."""
        return self._client.publish(topic, payload, qos=qos, retain=retain).mid

    def subscribe(self, topic: str) -> None:
        self._client.subscribe(topic, qos=1)

    def cut(self) -> None:
        """Lose the connection without a word to the broker; what it has answered meanwhile is not heard."""
        self._is_dead = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is gone already
                self._socket.shutdown(socket.SHUT_RDWR)

    def cut_when_sent(self) -> None:
        """Lose it once what was published has left, before the broker can answer."""
        self._is_cut_due = True

    def beat(self) -> None:
        """Keep an idle connection alive, and notice a broker that is silent; called every few seconds."""
        self._client.loop_misc()

    def say_goodbye(self) -> None:
        """Disconnect in good order. The broker forgets the session: nobody will come back for its commands."""
        if self._protocol is not MQTT_5:
            self._client.disconnect()
            return
        properties = Properties(PacketTypes.DISCONNECT)
        properties.SessionExpiryInterval = 0
        self._client.disconnect(properties=properties)

    def _connect(self) -> None:
        """In a thread of the executor."""
        if self._protocol is not MQTT_5:
            self._client.connect(self._broker.hostname, self._broker.port, KEEPALIVE_S)
            return
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = NEVER
        properties.ReceiveMaximum = MAX_MESSAGES
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        self._client.connect(
            self._broker.hostname, self._broker.port, KEEPALIVE_S, clean_start=False, properties=properties
        )

    def _in_loop(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Change what the event loop watches: at once in its thread, else soon."""
        try:
            is_in_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_in_loop = False
        if is_in_loop:
            call(*arguments)
        else:
            self._loop.call_soon_threadsafe(call, *arguments)

    def _on_socket_open(self, _client: paho.Client, _data: object, opened: Any) -> None:
        self._socket = opened
        self._in_loop(self._loop.add_reader, opened.fileno(), self._read)

    def _on_socket_close(self, _client: paho.Client, _data: object, opened: Any) -> None:
        self._socket = None
        self._in_loop(self._loop.remove_reader, opened.fileno())

    def _read(self) -> None:
        self._client.loop_read()
        while isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():  # no selector tells of these bytes
            self._client.loop_read()

    def _write(self) -> None:
        """Write at once; the socket is watched only where it does not take all of it."""
        self._client.loop_write()
        if self._socket is None:
            return
        if self._client.want_write():
            self._is_watched = True
            self._loop.add_writer(self._socket.fileno(), self._write)
        elif self._is_cut_due:
            self.cut()

    def _unwatch(self, opened: Any) -> None:
        if self._is_watched:
            self._is_watched = False
            self._loop.remove_writer(opened.fileno())

    def _on_connect(
        self, _client: paho.Client, _data: object, _flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._answered.set()
        if reason.is_failure:
            self.refusal = f"the broker refused the login ({reason})"
        elif not self._is_dead:
            self._listener.is_up(self, getattr(properties, "ReceiveMaximum", None))

    def _on_disconnect(self, *_: object) -> None:
        self.closed.set()
        self._answered.set()

    def _on_publish(
        self, _client: paho.Client, _data: object, packet: int, reason: ReasonCode, _properties: object
    ) -> None:
        if not self._is_dead:
            self._listener.is_answered(packet, str(reason), is_failure=reason.is_failure)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        if not self._is_dead:
            self._listener.hears(bytes(message.payload))


def find_protocol(broker: BrokerAddress) -> MQTTProtocolVersion:
    """Log in once and leave: MQTT 5 where the broker knows it, else 3.1.1.

    Raises:
        BrokerError: the broker cannot be reached, or lets nobody in.
    """
    refusal = ""
    for protocol in (MQTT_5, MQTT_311):
        try:
            reason = _try_login(broker, protocol)
        except OSError as error:
            raise BrokerError(
                f"broker {broker}: cannot be reached ({error}); check its address, and that it runs"
            ) from error
        if reason is not None and not reason.is_failure:
            return protocol
        refusal = f"refused the login ({reason})" if reason else "no answer"
    raise BrokerError(f"broker {broker}: {refusal}; check its address, user name and --broker-password-file")


def _try_login(broker: BrokerAddress, protocol: MQTTProtocolVersion) -> ReasonCode | None:
    answers: list[ReasonCode] = []
    client = _create_client(broker, f"fieldvit-simulate-{random.randrange(1 << 32):08x}", protocol, is_persistent=False)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: answers.append(reason)
    client.connect(broker.hostname, broker.port, KEEPALIVE_S)
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while not answers and time.monotonic() < deadline and client.loop(timeout=0.1) == paho.MQTT_ERR_SUCCESS:
        pass
    client.disconnect()
    return answers[0] if answers else None


def _create_client(
    broker: BrokerAddress, client_id: str, protocol: MQTTProtocolVersion, *, is_persistent: bool
) -> paho.Client:
    clean_session = None if protocol is MQTT_5 else not is_persistent
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id, clean_session, protocol=protocol)
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.username_pw_set(broker.username, broker.password)
    if broker.tls is not None:
        client.tls_set_context(broker.tls)
    return client


def _will_properties(protocol: MQTTProtocolVersion) -> Properties | None:
    if protocol is not MQTT_5:
        return None
    properties = Properties(PacketTypes.WILLMESSAGE)
    properties.WillDelayInterval = WILL_DELAY_S
    return properties
