"""The connection: logs in, survives the broker's death, and tells what is wrong without telling the password."""

import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st

import device.mqtt
from device.config import BrokerConfig
from device.contract.errors import BrokerError, ConfigError
from device.contract.topics import DeviceId
from device.mqtt import BACKOFF_S, Connection, backoff_s, probe
from device.spool import Spool
from tests.support.agent import PREFIX
from tests.support.broker import amqtt, find_free_port, listen, mosquitto

DEVICE = DeviceId("lab", "cam-1")


@contextmanager
def connection(
    directory: Path, port: int, *, commands: list[bytes] | None = None
) -> Iterator[tuple[Connection, Spool]]:
    spool = Spool(directory / "spool.db", max_bytes=10**6, max_age_s=10**6)
    link = Connection(
        BrokerConfig(hostname="127.0.0.1", port=port, keepalive_s=5),
        base=directory,
        device=DEVICE,
        spool=spool,
        birth=lambda: b"born",
        offline=b"gone",
        on_command=(commands if commands is not None else []).append,
        rng=random.Random(0),
    )
    link.start()
    try:
        yield link, spool
    finally:
        link.stop(5.0)
        spool.close()


@given(st.integers(0, 10_000), st.integers(0, 2**32))
def test_backoff_is_jittered_and_capped(failures, seed):
    wait = backoff_s(failures, random.Random(seed))
    assert BACKOFF_S[0] / 2 <= wait <= BACKOFF_S[1]


def test_messages_survive_the_broker_s_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device.mqtt, "BACKOFF_S", (0.1, 0.5))
    port, received = find_free_port(), set()
    stop = threading.Event()
    with mosquitto(tmp_path, port), listen(port, PREFIX, "listener"):
        pass  # from now on, the broker keeps for the listener what comes before it is back
    with connection(tmp_path, port) as (_, spool):

        def write() -> None:
            for number in range(60):
                spool.put("event", b"%d" % number)
                stop.wait(0.02)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(3):
            with mosquitto(tmp_path, port), listen(port, PREFIX, "listener") as listener:
                listener.wait_for("state", lambda payload: payload == b"born")
                time.sleep(0.3)
                received |= set(listener.all("event"))
        writer.join()
        with mosquitto(tmp_path, port), listen(port, PREFIX, "listener") as listener:
            deadline = time.monotonic() + 20
            while spool.depth and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.2)
            received |= set(listener.all("event"))
            assert spool.depth == spool.dropped == 0
    assert received == {b"%d" % number for number in range(60)}


@pytest.mark.parametrize("broker", ["mosquitto", "amqtt"])
def test_only_own_commands_arrive_and_a_stop_says_goodbye(tmp_path: Path, broker: str):
    commands: list[bytes] = []
    with amqtt() if broker == "amqtt" else mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        listener.client.publish("fieldvit/v1/lab/other/command", b"not ours", qos=1, retain=True).wait_for_publish(5)
        with connection(tmp_path, port, commands=commands) as (link, spool):
            listener.wait_for("state", lambda payload: payload == b"born")
            listener.send(b"ours")
            spool.put("event", b"e")
            listener.wait_for("event")
            link.announce()
            wait_until(lambda: listener.all("state").count(b"born") >= 2 and commands)
        listener.wait_for("state", lambda payload: payload == b"gone")
    assert commands == [b"ours"]


def wait_until(condition, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_command_sent_while_the_device_is_away_waits_at_the_broker(tmp_path: Path):
    commands: list[bytes] = []
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        with connection(tmp_path, port):
            listener.wait_for("state", lambda payload: payload == b"born")
        listener.send(b"later")
        with connection(tmp_path, port, commands=commands):
            wait_until(lambda: commands == [b"later"])


def test_login_and_its_failures(tmp_path: Path):
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "cam", "secret-word"], check=True)
    (tmp_path / "right").write_text("secret-word\n")
    (tmp_path / "wrong").write_text("guess")
    with mosquitto(tmp_path, extra=f"allow_anonymous false\npassword_file {passwords}") as port:
        probe(BrokerConfig(hostname="127.0.0.1", port=port, username="cam", password_file="right"), tmp_path)
        with pytest.raises(BrokerError, match="refused the login") as refused:
            probe(BrokerConfig(hostname="127.0.0.1", port=port, username="cam", password_file="wrong"), tmp_path)
        assert "guess" not in str(refused.value)
        with pytest.raises(BrokerError, match="refused the login"):
            probe(BrokerConfig(hostname="127.0.0.1", port=port), tmp_path)
    with pytest.raises(BrokerError, match="cannot be reached"):
        probe(BrokerConfig(hostname="127.0.0.1", port=port), tmp_path)
    with pytest.raises(ConfigError, match="none: the broker password cannot be read"):
        probe(BrokerConfig(hostname="127.0.0.1", port=port, username="cam", password_file="none"), tmp_path)


def test_results_go_out_by_one_thread_only_and_overflow_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device.mqtt, "BACKOFF_S", (0.05, 0.1))
    threads: set[str] = set()
    publish = paho.Client.publish

    def spy(self: paho.Client, *arguments: object, **options: object) -> object:
        if self._client_id.startswith(b"fieldvit-"):
            threads.add(threading.current_thread().name)
        return publish(self, *arguments, **options)

    monkeypatch.setattr(paho.Client, "publish", spy)
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener, connection(tmp_path, port) as (link, _):
        link.publish_result(b"nobody is connected")
        wait_until(lambda: link.is_connected)
        for number in range(300):
            link.publish_result(b"%d" % number)
        listener.wait_for("result", lambda payload: payload == b"299")
        assert listener.all("result") == [b"%d" % number for number in range(300)]
        assert threads == {"mqtt"}
        assert link.results_dropped == 0
        monkeypatch.setattr(link, "_pump", lambda client: None)  # a network that takes nothing
        time.sleep(0.3)
        for number in range(device.mqtt.MAX_RESULTS + 7):
            link.publish_result(b"%d" % number)
        assert (len(link._results), link.results_dropped) == (device.mqtt.MAX_RESULTS, 7)


def test_an_unexpected_error_does_not_end_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device.mqtt, "BACKOFF_S", (0.05, 0.1))
    failures = [ValueError("nobody thought of this")]
    connect = paho.Client.connect

    def fail_once(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return connect(*arguments)

    monkeypatch.setattr(paho.Client, "connect", fail_once)
    with mosquitto(tmp_path) as port, connection(tmp_path, port) as (link, _):
        wait_until(lambda: link.is_connected)
