"""Commands to single devices over MQTT: one order, one answer, or an error that says what to do."""

import base64
import contextlib
import json
import queue
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from device.contract.errors import BrokerError, MessageError
from device.contract.messages import VERBS, Command, Reply, decode_reply, encode_command
from device.contract.topics import DeviceId, parse_topic
from host.errors import FleetError


class CommandTimeoutError(FleetError, TimeoutError):
    """A device did not answer in time; the command expires on the device by itself."""

    def __init__(self, device: DeviceId, verb: str, timeout_s: float, note: str = "") -> None:
        super().__init__(
            f"{device}: no answer to {verb!r} within {timeout_s:g} s{note}; "
            "check on the monitor page that the device is online, then send it again"
        )
        self.device = device
        self.verb = verb


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` words; a value that is JSON is taken so (`5`, `true`, `["a"]`), any other as text.

    Raises:
        FleetError: a word is not of that form, or names something twice.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not name or name in arguments:
            raise FleetError(f"argument {word!r}: write NAME=VALUE, each name once, for example max_fps=5")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def take_image(result: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """A reply's result without its picture, which goes to `path` if there is one."""
    rest = dict(result)
    if "image" not in rest:
        return rest
    try:
        content = base64.b64decode(rest.pop("image"), validate=True)
    except (ValueError, TypeError) as error:
        raise FleetError("the picture in the answer cannot be read; ask again") from error
    if path is not None:
        path.write_bytes(content)
    return rest | {"image_bytes": len(content), "image_file": str(path) if path else None}


class Commander:
    """Sends commands through one connection; use it in a `with` block, from any thread."""

    def __init__(
        self,
        hostname: str,
        port: int = 1883,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hostname, self._port = hostname, port
        self._connect_timeout_s = connect_timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[tuple[DeviceId, str], queue.Queue[Reply]] = {}
        self._unreadable: dict[DeviceId, str] = {}
        self._subscriptions: dict[int, threading.Event] = {}  # by packet id
        self._refusal: str | None = None
        self._connected = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"fieldvit-{uuid.uuid4().hex[:12]}")
        self._client.username_pw_set(username, password)
        if tls is not None:
            self._client.tls_set_context(tls)
        self._client.on_connect = self._handle_connect
        self._client.on_disconnect = self._handle_disconnect
        self._client.on_subscribe = self._handle_subscribe
        self._client.on_message = self._handle_message

    def __enter__(self) -> Self:
        """Connect, or raise BrokerError."""
        try:
            self._client.connect(self._hostname, self._port, keepalive=30)
        except OSError as error:
            raise self._unreachable(str(error)) from error
        self._client.loop_start()
        if not self._connected.wait(self._connect_timeout_s) or self._refusal:
            self.__exit__()
            raise self._unreachable(self._refusal or f"no answer within {self._connect_timeout_s:g} s")
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def send(
        self, device: DeviceId, verb: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> Reply:
        """Send one command and wait for its reply; a reply with `ok = False` is returned, not raised.

        Raises:
            FleetError: there is no such verb.
            BrokerError: the broker cannot be reached.
            CommandTimeoutError: the device did not answer within `timeout_s`; the command expires at the same time.
        """
        if verb not in VERBS:
            raise FleetError(f"{verb!r} is no command; commands are {', '.join(VERBS)}")
        deadline = time.monotonic() + timeout_s
        command = Command(
            id=uuid.uuid4().hex, verb=verb, expires=self._clock() + timeout_s, arguments=dict(arguments or {})
        )
        key, replies = (device, command.id), queue.Queue[Reply](1)
        with self._lock:
            self._waiting[key] = replies
            self._unreadable.pop(device, None)
        try:
            self._subscribe(device.topic("reply"), deadline)
            self._publish(device.topic("command"), encode_command(command))
            return replies.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            note = f" (an unreadable reply came: {self._unreadable[device]})" if device in self._unreadable else ""
            raise CommandTimeoutError(device, verb, timeout_s, note) from None
        finally:
            with self._lock:
                del self._waiting[key]

    def order(self, device: DeviceId, command: Command) -> None:
        """Send a command without waiting for its reply; BrokerError when the broker does not take it.

        Sending one again is harmless: a device obeys an id once.
        """
        sent = self._client.publish(device.topic("command"), encode_command(command), qos=1)
        try:
            sent.wait_for_publish(self._connect_timeout_s)
        except (RuntimeError, ValueError) as error:
            raise self._unreachable("the connection was lost") from error
        if not sent.is_published():
            raise self._unreachable("it did not take a command in time")

    def _subscribe(self, topic: str, deadline: float) -> None:
        granted = threading.Event()
        with self._lock:  # the answer may arrive before `subscribe` returns its packet id
            code, mid = self._client.subscribe(topic, qos=1)
            self._subscriptions[mid or 0] = granted
            self._refusal = None
        try:
            is_granted = code == mqtt.MQTT_ERR_SUCCESS and granted.wait(max(0.0, deadline - time.monotonic()))
        finally:
            with self._lock:
                self._subscriptions.pop(mid or 0, None)
        if not is_granted or self._refusal:
            raise self._unreachable(self._refusal or "the connection was lost")

    def _publish(self, topic: str, payload: bytes) -> None:
        if self._client.publish(topic, payload, qos=1).rc != mqtt.MQTT_ERR_SUCCESS:
            raise self._unreachable("the connection was lost")

    def _unreachable(self, reason: str) -> BrokerError:
        where = f"{self._hostname}:{self._port}"
        return BrokerError(f"broker {where}: {reason}; check its address and that it runs (`fieldvit monitor` does)")

    def _handle_connect(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._refusal = f"refused the connection ({reason})" if reason.is_failure else None
        self._connected.set()

    def _handle_disconnect(self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._connected.clear()

    def _handle_subscribe(self, client: mqtt.Client, userdata: Any, mid: int, reasons: Any, properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._refusal = "refused the subscription to the device's replies"
        with self._lock:
            granted = self._subscriptions.get(mid)
        if granted:
            granted.set()

    def _handle_message(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        try:
            device, kind = parse_topic(message.topic)
            reply = decode_reply(bytes(message.payload)) if kind == "reply" else None
        except MessageError as error:
            with contextlib.suppress(MessageError):
                self._unreadable[parse_topic(message.topic)[0]] = str(error)
            return
        with self._lock:
            replies = self._waiting.get((device, reply.id)) if reply else None
        if reply and replies is not None:
            with contextlib.suppress(queue.Full):  # a second reply to one command says nothing new
                replies.put_nowait(reply)
