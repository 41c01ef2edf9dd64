"""The MQTT connection: sends what lies in the spool, receives commands. The only module that imports paho.

One thread owns the connection, so inference never waits for the network. Each attempt uses a new paho client and no
client-side session: what was not acknowledged is still in the spool and is sent again (the receiver drops repeated
sequence numbers), so no message is remembered in two places. The session on the broker is persistent: commands wait there.
MQTT 3.1.1, which every broker speaks.
"""

import logging
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device.config import BrokerConfig
from device.contract.errors import BrokerError, ConfigError
from device.contract.topics import DeviceId
from device.spool import Message, Spool, SpoolError

MAX_IN_FLIGHT = 20
CONNECT_TIMEOUT_S = 5.0
BACKOFF_S = (1.0, 60.0)
TICK_S = 0.1
MAX_RESULTS = 1000

log = logging.getLogger(__name__)


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
        rng: random.Random | None = None,
    ) -> None:
        self._config, self._base, self._device, self._spool = config, base, device, spool
        self._birth, self._offline, self._on_command = birth, offline, on_command
        self._rng = rng or random.Random()  # spreads a fleet's reconnects; nothing secret
        self._stop = threading.Event()
        self._announce = threading.Event()
        self.thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._in_flight: dict[int, int] = {}  # paho's message id -> the spool's
        self._last_sent = 0
        self._results: deque[bytes] = deque(maxlen=MAX_RESULTS)
        self.results_dropped = 0
        self.is_connected = False
        self._trouble = ""
        self._refusal = ""
        create_client(config, base, "", clean_session=True)  # a missing file is a mistake to report at the start

    def start(self) -> None:
        self.thread.start()

    def stop(self, flush_s: float) -> None:
        """Send what is spooled for up to `flush_s`, say goodbye and disconnect."""
        deadline = time.monotonic() + flush_s
        while self.is_connected and self._spool.depth and time.monotonic() < deadline:
            time.sleep(TICK_S / 2)
        self._stop.set()
        self.thread.join(timeout=flush_s)  # a hanging connect must not hold the shutdown up

    def announce(self) -> None:
        """Publish the state again, soon."""
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
            failures = 0 if time.monotonic() - started > BACKOFF_S[1] else failures + 1
            self._stop.wait(backoff_s(failures, self._rng))

    def _session(self) -> None:
        """Connect and serve until the connection is lost or the agent stops."""
        self._in_flight.clear()
        self._last_sent = 0
        self._refusal = ""
        client = create_client(
            self._config, self._base, f"fieldvit-{self._device.site}-{self._device.device}", clean_session=False
        )
        client.on_connect, client.on_message, client.on_publish = self._on_connect, self._on_message, self._on_publish
        client.will_set(self._device.topic("state"), self._offline, qos=1, retain=True)
        client.connect(self._config.hostname, self._config.port, self._config.keepalive_s)
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while not self._stop.is_set():
            if client.loop(timeout=TICK_S) != paho.MQTT_ERR_SUCCESS:
                self._report(self._refusal or "the broker closed the connection")
                return
            if self.is_connected:
                self._pump(client)
            elif time.monotonic() > deadline:
                self._report("the broker accepted no login in time")
                return
        if self.is_connected:
            _say_goodbye(client, self._device.topic("state"), self._offline)

    def _pump(self, client: paho.Client) -> None:
        if self._announce.is_set():
            self._announce.clear()
            client.publish(self._device.topic("state"), self._birth(), qos=1, retain=True)
        room = MAX_IN_FLIGHT - len(self._in_flight)
        for message in self._spool.pending(self._last_sent, room) if room > 0 else []:
            self._send(client, message)
        while self._results and not client.want_write():  # what paho holds back would pile up in memory
            client.publish(self._device.topic("result"), self._results.popleft(), qos=0)

    def _send(self, client: paho.Client, message: Message) -> None:
        sent = client.publish(self._device.topic(message.kind), message.payload, qos=1)
        self._in_flight[sent.mid] = message.id
        self._last_sent = message.id

    def _on_connect(
        self,
        client: paho.Client,
        _data: object,
        _flags: paho.ConnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._refusal = f"the broker refused the login ({reason})"
            return
        client.subscribe(self._device.topic("command"), qos=1)
        self._announce.set()
        self.is_connected = True
        self._trouble = ""
        log.info("connected to %s:%d", self._config.hostname, self._config.port)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        if message.topic == self._device.topic("command"):  # amqtt also delivers retained messages nobody asked for
            self._on_command(bytes(message.payload))

    def _on_publish(
        self, _client: paho.Client, _data: object, mid: int, _reason: ReasonCode, _properties: Properties
    ) -> None:
        message_id = self._in_flight.pop(mid, None)
        if message_id is not None:
            self._spool.acknowledge(message_id)

    def _report(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("mqtt: %s; trying again, messages wait in the spool", trouble)
        self._trouble = trouble


def create_client(config: BrokerConfig, base: Path, client_id: str, *, clean_session: bool) -> paho.Client:
    """A paho client with login and TLS as configured, not connected yet; ConfigError when a file is missing or wrong."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id, clean_session, protocol=paho.MQTTv311)
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.max_inflight_messages_set(2 * MAX_IN_FLIGHT)
    if config.username is not None:
        client.username_pw_set(config.username, read_password(config, base))
    if config.ca_file is not None:
        client.tls_set_context(_tls_context(config, base))
    return client


def _tls_context(config: BrokerConfig, base: Path) -> ssl.SSLContext:
    """The broker must be one of `ca_file`'s, and have the name that we call it by."""
    path, what = base / str(config.ca_file), "ca_file"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(path)
        if config.cert_file is not None:
            path, what = base / config.cert_file, "cert_file and key_file"
            context.load_cert_chain(path, base / config.key_file if config.key_file else None, _no_passphrase)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(f"{path}: cannot be used for TLS ({error}); see broker.{what}") from error
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase, which an agent that starts alone cannot give")


def read_password(config: BrokerConfig, base: Path) -> str | None:
    """The password's file content without its line end; ConfigError when it cannot be read."""
    if config.password_file is None:
        return None
    path = base / config.password_file
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the broker password cannot be read ({error}); see broker.password_file") from error


def probe(config: BrokerConfig, base: Path) -> None:
    """Log in once and leave.

    Raises:
        BrokerError: the broker cannot be reached or refuses the login.
    """
    outcome: list[ReasonCode] = []
    client = create_client(config, base, f"fieldvit-doctor-{random.randrange(1 << 32):08x}", clean_session=True)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: outcome.append(reason)
    address = f"{config.hostname}:{config.port}"
    try:
        client.connect(config.hostname, config.port, config.keepalive_s)
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while not outcome and time.monotonic() < deadline and client.loop(timeout=TICK_S) == paho.MQTT_ERR_SUCCESS:
            pass
        client.disconnect()
    except OSError as error:
        raise BrokerError(
            f"{address} cannot be reached ({error}); check broker.hostname, port and the network"
        ) from error
    if not outcome or outcome[0].is_failure:
        answer = str(outcome[0]) if outcome else "no answer"
        raise BrokerError(f"{address} refused the login ({answer}); check broker.username, password_file and ca_file")


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
