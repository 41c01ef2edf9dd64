"""The connection: logs in, survives the broker's death, and tells what is wrong without telling the password."""

import contextlib
import os
import random
import shutil
import signal
import socket
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
from device.flight import MAX_BYTES, MAX_MESSAGES, Flight
from device.mqtt import BACKOFF_S, Connection, backoff_s, probe
from device.spool import LOW, Spool
from tests.support.agent import PREFIX
from tests.support.broker import amqtt, find_free_port, listen, mosquitto
from tests.support.patience import PATIENCE
from tests.support.site import make_site

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
def test_only_own_commands_arrive_and_a_stop_says_goodbye(tmp_path: Path, broker: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device.mqtt, "CONNECT_TIMEOUT_S", 1.0)  # amqtt answers MQTT 5 with silence
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
            assert link.protocol == {"mosquitto": "MQTT 5", "amqtt": "MQTT 3.1.1"}[broker]
        listener.wait_for("state", lambda payload: payload == b"gone")
    assert commands == [b"ours"]


def wait_until(condition, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s * PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_messages_wait_in_their_order_until_somebody_subscribes(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(device.mqtt, "NOBODY_S", 0.2)
    payloads = [b"%d" % number for number in range(50)]
    with mosquitto(tmp_path) as port, connection(tmp_path, port) as (link, spool):
        for payload in payloads:
            spool.put("event", payload)
        wait_until(lambda: "nobody subscribes" in caplog.text)
        time.sleep(0.5)
        assert (spool.depth, link.is_connected) == (50, True)
        assert caplog.text.count("nobody subscribes") == 1
        with listen(port, PREFIX) as listener:
            wait_until(lambda: not spool.depth)
            time.sleep(0.2)
            assert listener.all("event") == payloads


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

    def fail_once(*arguments: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return connect(*arguments, **options)

    monkeypatch.setattr(paho.Client, "connect", fail_once)
    with mosquitto(tmp_path) as port, connection(tmp_path, port) as (link, _):
        wait_until(lambda: link.is_connected)


@contextmanager
def scripted_broker(*answers: bytes) -> Iterator[tuple[int, list[int]]]:
    """A server that answers each CONNECT with the next bytes, empty ones by hanging up; yields its port and the versions asked."""
    versions: list[int] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            for answer in answers:
                connection, _ = server.accept()
                with connection:
                    versions.append(connection.recv(1000)[8])
                    connection.sendall(answer)
                    while answer[3:4] == b"\x00" and connection.recv(1000):  # a login that was granted
                        pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1], versions
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(timeout=10 * PATIENCE)


GRANTED_5, GRANTED_311 = b"\x20\x03\x00\x00\x00", b"\x20\x02\x00\x00"


@pytest.mark.parametrize(
    ("answers", "versions", "is_remembered"),
    [
        ((b"\x20\x03\x00\x84\x00", GRANTED_311), [5, 4], True),  # MQTT 5: unsupported protocol version
        ((b"\x20\x02\x00\x01", GRANTED_311), [5, 4], True),  # a broker of 3.1.1 says so in its own way
        ((b"", GRANTED_311), [5, 4], False),
        ((b"", b"", GRANTED_5), [5, 4, 5], False),  # it was only stopped
    ],
)
def test_a_broker_that_refuses_mqtt_5_is_asked_with_3_1_1(
    tmp_path: Path, monkeypatch, answers, versions, is_remembered
):
    monkeypatch.setattr(device.mqtt, "BACKOFF_S", (0.05, 0.1))
    with scripted_broker(*answers) as (port, asked), connection(tmp_path, port) as (link, _):
        wait_until(lambda: link.is_connected)
        assert asked == versions
        assert (link.protocol == "MQTT 5") == (versions[-1] == 5)
        assert link._is_version_known == is_remembered


def test_a_silent_broker_is_taken_for_one_of_3_1_1_after_two_guesses(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(device.mqtt, "BACKOFF_S", (0.05, 0.1))
    lost = GRANTED_311 + b"\xe0\x00"  # granted, then an end of the connection that 3.1.1 does not know
    answers = (b"", lost, b"", lost, GRANTED_311)
    with scripted_broker(*answers) as (port, asked), connection(tmp_path, port):
        wait_until(lambda: len(asked) == 5)
    assert asked == [5, 4, 5, 4, 4]


def test_a_message_that_the_broker_s_rules_refuse_stays_in_the_spool(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(device.mqtt, "BACKOFF_S", (0.05, 0.1))
    rules, process = tmp_path / "acl", tmp_path / "pid"
    rules.write_text(f"topic write {PREFIX}/state\ntopic read {PREFIX}/#\n")
    extra = f"allow_anonymous true\nacl_file {rules}\npid_file {process}"
    with (
        mosquitto(tmp_path, extra=extra) as port,
        listen(port, PREFIX) as listener,
        connection(tmp_path, port) as (link, spool),
    ):
        spool.put("event", b"refused")
        wait_until(lambda: "Not authorized" in link._trouble)
        assert (spool.depth, spool.dropped, listener.all("event")) == (1, 0, [])
        rules.write_text(f"topic readwrite {PREFIX}/#\n")
        os.kill(int(process.read_text()), signal.SIGHUP)
        listener.wait_for("event", lambda payload: payload == b"refused")
        wait_until(lambda: spool.depth == 0)


def test_the_broker_s_packet_limit_costs_only_the_message_that_is_over_it(tmp_path: Path):
    with (
        mosquitto(tmp_path, extra="allow_anonymous true\nmax_packet_size 2000") as port,
        listen(port, PREFIX) as listener,
        connection(tmp_path, port) as (_, spool),
    ):
        for payload in (b"a", b"x" * 3000, b"b"):
            spool.put("event", payload)
        listener.wait_for("event", lambda payload: payload == b"b")
        wait_until(lambda: spool.depth == 0)
        assert (listener.all("event"), spool.dropped) == ([b"a", b"b"], 1)


def test_replies_overtake_what_waits_and_the_rest_keeps_its_order(tmp_path: Path):
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        spool = Spool(tmp_path / "spool.db", max_bytes=10**7, max_age_s=10**6)
        for number in range(200):
            spool.put("telemetry", b"%d" % number, priority=LOW)
        spool.receive_command("c", 0)
        spool.answer_command("c", b"reply")
        spool.close()
        with connection(tmp_path, port):
            listener.wait_for("telemetry", lambda payload: payload == b"199")
    assert listener.all("telemetry") == [b"%d" % number for number in range(200)]
    kinds = [kind for kind, _ in listener.heard if kind != "state"]
    assert kinds.index("reply") == 0


@given(st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.integers(0, 2**20)), max_size=60))
def test_what_is_under_way_is_bounded(receive_maximum, steps):
    flight, under_way = Flight(), {}
    flight.reset(receive_maximum)
    for packet, (is_sending, size) in enumerate(steps):
        if is_sending and flight.fits(size):
            flight.add(packet, packet, size)
            under_way[packet] = size
        elif not is_sending and under_way:
            landed = min(under_way)
            assert flight.land(landed) == landed
            del under_way[landed]
        assert len(flight) == len(under_way) <= min(receive_maximum, MAX_MESSAGES)
        assert sum(under_way.values()) <= MAX_BYTES or len(under_way) == 1
    if not under_way:
        assert flight.fits(2**30)  # never stuck


def test_a_client_certificate_and_its_mistakes(tmp_path: Path):
    (tmp_path / "ca.pem").write_text("no certificate")
    known = {"hostname": "localhost", "ca_file": "ca.pem"}
    with pytest.raises(ConfigError, match=r"ca.pem: the broker's CA certificates cannot be read .*see broker.ca_file"):
        probe(BrokerConfig(**known), tmp_path)
    shutil.copy(make_site(tmp_path).directory / "ca.pem", tmp_path)
    with pytest.raises(
        ConfigError, match=r"none.pem: this board's certificate or key .*see broker.cert_file and key_file"
    ):
        probe(BrokerConfig(**known, cert_file="none.pem"), tmp_path)
    with pytest.raises(ConfigError, match=r"needs broker.ca_file"):
        BrokerConfig(hostname="h", cert_file="c.pem")
    with pytest.raises(ConfigError, match=r"needs broker.cert_file"):
        BrokerConfig(hostname="h", ca_file="c.pem", key_file="k.pem")


def test_a_broker_that_lets_no_command_through_is_told_of_and_still_used(tmp_path: Path, caplog):
    granted = GRANTED_5 + b"\x90\x04\x00\x01\x00\x87"  # SUBACK of packet 1: not authorized
    with scripted_broker(granted) as (port, _), connection(tmp_path, port) as (link, _):
        wait_until(lambda: "lets no command through (Not authorized)" in caplog.text)
        assert link.is_connected
