"""Real MQTT brokers on free loopback ports, and a client that collects what it hears."""

import asyncio
import getpass
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from tests.support.patience import PATIENCE


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mosquitto(directory: Path, port: int = 0, *, extra: str = "allow_anonymous true") -> Iterator[int]:
    """Run mosquitto until the block ends; yields its port. Skips the test where it is not installed.

    Sessions and retained messages lie in `directory`, so the next one there on the same port continues them.
    """
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed")
    port = port or find_free_port()
    config = directory / f"mosquitto-{port}.conf"
    user = getpass.getuser()  # started by root, it would become another user, who may not read a test's files
    lines = [f"user {user}", "persistence true", f"persistence_location {directory}/", f"listener {port} 127.0.0.1"]
    config.write_text("\n".join([*lines, extra, ""]))
    process = subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10 * PATIENCE)


@contextmanager
def amqtt() -> Iterator[int]:
    """Run amqtt in a thread until the block ends; yields its port."""
    from amqtt.broker import Broker

    port = find_free_port()
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="amqtt", daemon=True)
    thread.start()

    async def start() -> Any:
        broker = Broker(config)  # must be made inside the loop
        await broker.start()
        return broker

    broker = asyncio.run_coroutine_threadsafe(start(), loop).result(20 * PATIENCE)
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(broker.shutdown(), loop).result(20 * PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


def wait_until_listening(port: int, timeout_s: float = 10) -> None:
    timeout_s *= PATIENCE
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port} after {timeout_s} s")


@dataclass
class Listener:
    """Everything published under one prefix, as (topic kind, payload), in order of arrival."""

    client: paho.Client
    prefix: str
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    _new: threading.Condition = field(default_factory=threading.Condition)

    def send(self, payload: bytes) -> None:
        self.client.publish(f"{self.prefix}/command", payload, qos=1).wait_for_publish(5 * PATIENCE)

    def wait_for(self, kind: str, matches: Callable[[bytes], Any] = lambda _: True, timeout_s: float = 20) -> bytes:
        """The first payload of that kind that matches, heard already or to come."""
        timeout_s *= PATIENCE
        deadline = time.monotonic() + timeout_s
        with self._new:
            while True:
                for heard_kind, payload in self.heard:
                    if heard_kind == kind and matches(payload):
                        return payload
                if not self._new.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"no such {kind} within {timeout_s} s; heard {self.heard}")

    def all(self, kind: str) -> list[bytes]:
        with self._new:
            return [payload for heard_kind, payload in self.heard if heard_kind == kind]

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        with self._new:
            self.heard.append((message.topic.rsplit("/", 1)[1], message.payload))
            self._new.notify_all()


@contextmanager
def listen(port: int, prefix: str, client_id: str = "") -> Iterator[Listener]:
    """Subscribe to `PREFIX/#` and collect. With a `client_id`, the broker keeps what is published between two calls."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id, clean_session=not client_id)
    listener, subscribed = Listener(client, prefix), threading.Event()
    client.on_message = listener._on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect("127.0.0.1", port)
    client.subscribe(f"{prefix}/#", qos=1)
    client.loop_start()
    try:
        assert subscribed.wait(10 * PATIENCE)
        yield listener
    finally:
        client.disconnect()
        client.loop_stop()
