"""Ingest: from the broker into the store, acknowledging a message only once it is committed.

paho's thread fills a bounded queue; one writer thread empties it in small batches, one transaction each. What was not
acknowledged is sent again by the broker (the session is persistent), and the store drops what it already has. So a
crash anywhere loses nothing that a device was told had arrived.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from device.contract.errors import BrokerError
from device.contract.messages import (
    Event,
    Reply,
    Result,
    State,
    Telemetry,
    decode_event,
    decode_reply,
    decode_result,
    decode_state,
    decode_telemetry,
)
from device.contract.topics import ROOT, DeviceId, parse_topic
from host.errors import MonitorError
from host.monitor.broker import BrokerAddress
from host.monitor.store import Store

logger = logging.getLogger(__name__)

TOPICS = f"{ROOT}/+/+/+"
QUEUE_LENGTH = 1000
BATCH = 200
FROM_HOST = ("command", "frame")
"""The topics on which operators speak to boards."""
RETRY_S = 1.0

Record = State | Telemetry | Event | Reply | Result
_DECODERS: dict[str, Callable[[bytes, DeviceId], Record]] = {
    "state": lambda payload, _: decode_state(payload),
    "telemetry": lambda payload, sender: decode_telemetry(payload, sender=sender),
    "event": lambda payload, sender: decode_event(payload, sender=sender),
    "reply": lambda payload, _: decode_reply(payload),
    "result": lambda payload, _: decode_result(payload),
}


class Ingest:
    """Subscribes to every device and records what they say.

    Args:
        store: where to; its identity names the session at the broker.
        broker: where from.
        on_change: called after a commit with each device that it touched (None: an unreadable topic), and with None
            when the connection comes or goes. It must not block.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: Store,
        broker: BrokerAddress,
        *,
        on_change: Callable[[DeviceId | None], None] = lambda device: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._broker, self._on_change, self._clock = store, broker, on_change, clock
        self._queue: queue.Queue[tuple[int, mqtt.MQTTMessage] | None] = queue.Queue(QUEUE_LENGTH)
        self._writer = threading.Thread(target=self._write_batches, name="ingest-writer", daemon=True)
        self._stopping = threading.Event()
        self._subscribed = threading.Event()
        self._refusal: str | None = None
        self._connection = 0  # numbers the connections: an old one's packet ids mean nothing to the next
        self._client = self._build_client()

    @property
    def is_connected(self) -> bool:
        return self._subscribed.is_set()

    def start(self, timeout_s: float = 10.0) -> None:
        """Connect and subscribe, or raise BrokerError; from then on, reconnect for ever."""
        self._writer.start()
        self._client.connect_async(self._broker.hostname, self._broker.port, keepalive=30)
        self._client.loop_start()
        deadline = time.monotonic() + timeout_s
        while not self._subscribed.wait(0.02):
            if self._refusal is not None or time.monotonic() > deadline:
                self.stop()
                reason = self._refusal or f"no answer within {timeout_s:g} s"
                raise BrokerError(f"broker {self._broker}: {reason}; check its address, and that it runs")

    def stop(self) -> None:
        """Commit and acknowledge what has arrived, then disconnect; the rest stays at the broker."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # full: the writer sees `_stopping` when it has emptied it
            self._queue.put_nowait(None)
        self._writer.join(timeout=5)
        self._client.disconnect()
        self._client.loop_stop()
        self._subscribed.clear()

    def _build_client(self) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"fieldvit-monitor-{self._store.identity[:12]}",
            clean_session=False,
            manual_ack=True,
        )
        client.username_pw_set(self._broker.username, self._broker.password)
        if self._broker.tls is not None:
            client.tls_set_context(self._broker.tls)
        client.reconnect_delay_set(min_delay=1, max_delay=30)
        client.on_connect = self._handle_connect
        client.on_subscribe = self._handle_subscribe
        client.on_disconnect = self._handle_disconnect
        client.on_message = self._handle_message
        return client

    def _handle_connect(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._refusal = f"refused the connection ({reason})"
            logger.error("broker %s %s", self._broker, self._refusal)
            return
        self._connection += 1
        client.subscribe(TOPICS, qos=1)

    def _handle_subscribe(self, client: mqtt.Client, userdata: Any, mid: int, reasons: Any, properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._refusal = f"refused the subscription to {TOPICS}"
            logger.error("broker %s %s", self._broker, self._refusal)
            return
        self._refusal = None
        self._subscribed.set()
        self._on_change(None)

    def _handle_disconnect(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._subscribed.clear()
        if not self._stopping.is_set():
            logger.warning("broker %s: connection lost (%s); reconnecting", self._broker, reason)
        self._on_change(None)

    def _handle_message(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        while not self._stopping.is_set():  # when stopping, it stays unacknowledged and comes again next time
            try:
                self._queue.put((self._connection, message), timeout=0.2)
            except queue.Full:
                continue
            return

    def _write_batches(self) -> None:
        while True:
            batch, is_last = self._next_batch()
            while batch:
                try:
                    changed = self._write(batch)
                except MonitorError:
                    logger.exception("nothing stored; trying again in %g s", RETRY_S)
                    if self._stopping.wait(RETRY_S):
                        return
                else:
                    self._acknowledge(batch)
                    for device in changed:
                        self._on_change(device)
                    break
            if is_last:
                return

    def _next_batch(self) -> tuple[list[tuple[int, mqtt.MQTTMessage]], bool]:
        batch = []
        with contextlib.suppress(queue.Empty):
            item = self._queue.get(timeout=0.5)
            while item is not None:
                batch.append(item)
                if len(batch) == BATCH:
                    return batch, False
                item = self._queue.get_nowait()
            return batch, True
        return batch, self._stopping.is_set() and not batch

    def _write(self, batch: list[tuple[int, mqtt.MQTTMessage]]) -> set[DeviceId | None]:
        changed: set[DeviceId | None] = set()
        with self._store.transaction(_senders(batch)):
            for _, message in batch:
                changed.add(self._record(message))
        return changed

    def _record(self, message: mqtt.MQTTMessage) -> DeviceId | None:
        received, device, topic = self._clock(), None, "(not UTF-8)"
        payload = bytes(message.payload)
        try:
            topic = message.topic
            device, kind = parse_topic(topic)
            if kind in FROM_HOST:  # and no picture is kept here, a broker without access rules sends them too
                return device
            record = _DECODERS[kind](payload, device)
            record_message(self._store, device, record, received=received, retained=message.retain)
        except MonitorError:
            raise
        except Exception as error:  # a sender must not stop the others: whatever it did is kept and shown
            if not isinstance(error, ValueError):
                logger.exception("topic %s: unexpected error", topic)
            reason = str(error) or type(error).__name__
            self._store.quarantine(topic, payload, reason, received=received, device=device)
        return device

    def _acknowledge(self, batch: list[tuple[int, mqtt.MQTTMessage]]) -> None:
        for connection, message in batch:
            if message.qos and connection == self._connection:
                self._client.ack(message.mid, message.qos)


def _senders(batch: Iterable[tuple[int, mqtt.MQTTMessage]]) -> set[DeviceId]:
    """The devices that can be read from the topics."""
    senders = set()
    for _, message in batch:
        with contextlib.suppress(ValueError):
            senders.add(parse_topic(message.topic)[0])
    return senders


def record_message(store: Store, device: DeviceId, record: Record, *, received: float, retained: bool = False) -> None:
    """Put one message into the store, by its type."""
    match record:
        case State():
            store.record_state(device, record, received=received, retained=retained)
        case Telemetry():
            store.record_telemetry(device, record, received=received)
        case Event():
            store.record_event(device, record, received=received)
        case Reply():  # a picture is for who asked for it, and is not kept
            kept = replace(record, result={k: v for k, v in record.result.items() if k != "image"})
            store.record_reply(device, kept, received=received)
        case Result():
            store.record_result(device, record, received=received)
