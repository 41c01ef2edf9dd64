"""From a real broker into the store: every payload, hostile ones too, outages and restarts."""

import time
from collections.abc import Iterator

import paho.mqtt.client as mqtt
import pytest

from device.contract.errors import BrokerError
from device.contract.messages import (
    Event,
    Reply,
    Result,
    State,
    Telemetry,
    encode_event,
    encode_reply,
    encode_result,
    encode_state,
    encode_telemetry,
)
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.broker import (
    BrokerAddress,
    PortTakenError,
    bind_port,
    find_mosquitto,
    parse_broker_url,
    start_broker,
)
from host.monitor.ingest import Ingest
from host.monitor.store import Store, open_store

CAMERA = DeviceId("greenhouse", "cam-1")
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.fixture(scope="module", params=[pytest.param("mosquitto", marks=needs_mosquitto), "amqtt"])
def broker(request) -> Iterator[BrokerAddress]:
    with start_broker(request.param) as running:
        assert running.kind == request.param
        yield running.address


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = open_store(tmp_path / "monitor.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def device(broker) -> Iterator[mqtt.Client]:
    client = connect(broker)
    yield client
    client.disconnect()
    client.loop_stop()


def connect(broker: BrokerAddress, client_id: str = "", will: State | None = None) -> mqtt.Client:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id)
    if will:
        client.will_set(CAMERA.topic("state"), encode_state(will), qos=1)
    client.connect(broker.hostname, broker.port)
    client.loop_start()
    return client


def publish(client: mqtt.Client, kind: str, payload: bytes, *, device: DeviceId = CAMERA) -> None:
    client.publish(device.topic(kind), payload, qos=1).wait_for_publish(timeout=5)


def telemetry(sequence: int, boot: str = "b1") -> bytes:
    values = {"drift": 0.1, "class/0": 4.0}
    return encode_telemetry(CAMERA, Telemetry(boot=boot, sequence=sequence, time=1000.0 + sequence, values=values))


def wait_until(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)


def received(store: Store) -> int:
    row = store.device(CAMERA)
    return row.received if row else 0


def test_every_kind_of_message_arrives_and_is_announced(broker, device, store):
    changed = []
    ingest = Ingest(store, broker, on_change=changed.append)
    ingest.start()
    publish(device, "state", encode_state(State(status="online", boot="b1", board="raspberry-pi-5")))
    publish(device, "telemetry", telemetry(1))
    publish(device, "telemetry", telemetry(1))
    event = Event(kind="drift", boot="b1", sequence=4, time=1000.0, data={"reason": "dusk"})
    publish(device, "event", encode_event(CAMERA, event))
    publish(device, "reply", encode_reply(Reply(id="x", ok=True)))
    publish(device, "result", encode_result(Result(frame_id="f", label="a", confidence=0.9, time=1.0)))
    publish(device, "command", b"{}")
    publish(device, "frame", b"a picture, which is for the board alone")
    wait_until(lambda: received(store) == 2)
    ingest.stop()
    row = store.device(CAMERA)
    assert (row.status, row.state.board, row.duplicates, row.missing) == ("online", "raspberry-pi-5", 1, 2)
    assert store.events(CAMERA)[0].event == event
    assert CAMERA in changed
    assert store.quarantined_total() == 0


def test_malformed_messages_are_quarantined_and_stop_nobody(broker, device, store):
    ingest = Ingest(store, broker)
    ingest.start()
    hostile = {
        "telemetry": [
            b"",
            b"\xff\x00",
            b"[]",
            b'[{"n":[]}]',
            telemetry(2**60),
            telemetry(0),
            telemetry(1, boot="\u200b"),
        ],
        "state": [b'{"schema":1,"status":"online","boot":"b","time":1e999}', b'{"schema":9}', b"[" * 100_000],
        "event": [
            encode_event(CAMERA, Event(kind="drift", boot="b", sequence=9, time=1.0, data={"x": 7})).replace(
                b"7", b"1e999"
            )
        ],
    }
    for kind, payloads in hostile.items():
        for payload in payloads:
            publish(device, kind, payload)
    device.publish("fieldvit/v1/green house/cam/state", b"{}", qos=1).wait_for_publish(timeout=5)
    publish(device, "telemetry", telemetry(1))
    wait_until(lambda: received(store) == 1)
    ingest.stop()
    assert store.quarantined_total() == 12
    reasons = " ".join(row.reason for row in store.quarantined())
    assert "'green house' must match" in reasons
    assert "sequence must be 1..2^53" in reasons


def test_late_will_does_not_hide_the_new_boot(broker, store):
    ingest = Ingest(store, broker)
    ingest.start()
    old = connect(broker, "cam-old", will=State(status="offline", boot="b1"))
    publish(old, "state", encode_state(State(status="online", boot="b1")))
    new = connect(broker, "cam-new")
    states: list[bytes] = []
    new.on_message = lambda client, userdata, message: states.append(message.payload)
    new.subscribe(CAMERA.topic("state"), qos=1)
    publish(new, "state", encode_state(State(status="online", boot="b2")))
    wait_until(lambda: (row := store.device(CAMERA)) is not None and row.boot == "b2")
    old._sock_close()  # the socket drops without a DISCONNECT, so the broker sends the will
    old.loop_stop()
    wait_until(lambda: any(b"offline" in state for state in states))
    publish(new, "telemetry", telemetry(1, boot="b2"))  # behind the will, so ingest has seen both
    wait_until(lambda: received(store) == 1)
    ingest.stop()
    assert (store.device(CAMERA).status, store.device(CAMERA).boot) == ("online", "b2")
    new.disconnect()
    new.loop_stop()


@needs_mosquitto
def test_a_restart_of_ingest_loses_nothing_that_was_acknowledged(store):
    with start_broker("mosquitto") as running:
        device = connect(running.address)
        sequence = 0
        for _ in range(4):
            ingest = Ingest(store, running.address)
            ingest.start()
            for _ in range(50):
                sequence += 1
                device.publish(CAMERA.topic("telemetry"), telemetry(sequence), qos=1)
            ingest.stop()  # in the middle of the stream
            sequence += 1
            publish(device, "telemetry", telemetry(sequence))  # while nobody listens
        ingest = Ingest(store, running.address)
        ingest.start()
        wait_until(lambda: received(store) == sequence)
        ingest.stop()
        assert store.device(CAMERA).missing == 0
        device.disconnect()
        device.loop_stop()


@needs_mosquitto
def test_nothing_is_acknowledged_before_it_is_stored(store, monkeypatch):
    full = MonitorError("disk full")
    monkeypatch.setattr("host.monitor.ingest.RETRY_S", 0.05)
    with start_broker("mosquitto") as running:
        device = connect(running.address)
        ingest = Ingest(store, running.address)
        with monkeypatch.context() as broken:
            broken.setattr(store, "record_telemetry", lambda *a, **k: (_ for _ in ()).throw(full))
            ingest.start()
            publish(device, "telemetry", telemetry(1))
            time.sleep(0.2)
            ingest.stop()
        assert store.devices() == []
        again = Ingest(store, running.address)
        again.start()
        wait_until(lambda: received(store) == 1)
        again.stop()
        device.disconnect()
        device.loop_stop()


@needs_mosquitto
def test_ingest_reconnects_and_the_broker_keeps_its_session(store, tmp_path):
    with start_broker("mosquitto", directory=tmp_path / "broker") as running:
        port = running.port
        ingest = Ingest(store, running.address)
        ingest.start()
    wait_until(lambda: not ingest.is_connected)
    with start_broker("mosquitto", port=port, directory=tmp_path / "broker") as running:
        device = connect(running.address)
        publish(device, "telemetry", telemetry(1))  # the session is on disk: kept until ingest is back
        wait_until(lambda: ingest.is_connected and received(store) == 1, timeout_s=8)
        ingest.stop()
        device.disconnect()
        device.loop_stop()


def test_no_broker_is_one_clear_error(store):
    with bind_port("test", "127.0.0.1", 0) as nobody:
        address = BrokerAddress(hostname="127.0.0.1", port=nobody.getsockname()[1])
        with pytest.raises(BrokerError, match=rf"127.0.0.1:{address.port}: no answer within 0.3 s; check"):
            Ingest(store, address).start(timeout_s=0.3)


def test_a_taken_port_is_one_clear_error():
    with bind_port("other", "127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(PortTakenError, match=f"{port} cannot be used.*choose another port"),
            start_broker(port=port),
        ):
            pass


def test_broker_urls(tmp_path):
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    assert parse_broker_url("mqtt://hub@broker.local", password_file=secret) == BrokerAddress(
        hostname="broker.local", port=1883, username="hub", password="s3cret"
    )
    assert parse_broker_url("mqtt://[::1]:99") == BrokerAddress(hostname="::1", port=99)
    for url in ("http://x", "mqtt://", "mqtt://h:0", "mqtt://h:99999", "mqtt://h/path", "broker:1883"):
        with pytest.raises(MonitorError):
            parse_broker_url(url)
    with pytest.raises(MonitorError) as refused:
        parse_broker_url("mqtt://hub:hunter2@h")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(MonitorError, match="cannot be read"):
        parse_broker_url("mqtt://h", password_file=tmp_path / "none")
