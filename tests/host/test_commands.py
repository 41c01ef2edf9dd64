"""Commands over a real broker to a small fake device: one reply each, or an error that says what to do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import paho.mqtt.client as mqtt
import pytest

from device.contract.errors import BrokerError
from device.contract.messages import Command, Reply, decode_command, encode_reply
from device.contract.topics import DeviceId
from host.fleet.commands import Commander, CommandTimeoutError
from host.monitor.broker import BrokerAddress, bind_port, find_mosquitto, start_broker

CAMERA = DeviceId("greenhouse", "cam-1")
OTHER = DeviceId("greenhouse", "cam-2")


@pytest.fixture(scope="module", params=["mosquitto", "amqtt"])
def broker(request) -> Iterator[BrokerAddress]:
    if request.param == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with start_broker(request.param) as running:
        yield running.address


@contextmanager
def fake_device(
    broker: BrokerAddress,
    answer: Callable[[Command], list[bytes]],
    *,
    listens_as: DeviceId = CAMERA,
    replies_as: DeviceId = CAMERA,
) -> Iterator[list[Command]]:
    """A device that keeps the commands it gets and sends what `answer` returns."""
    commands: list[Command] = []

    def handle(client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        commands.append(decode_command(message.payload))
        for payload in answer(commands[-1]):
            client.publish(replies_as.topic("reply"), payload, qos=1)

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    subscribed: list[int] = []
    client.on_message = handle
    client.on_subscribe = lambda *arguments: subscribed.append(1)
    client.connect(broker.hostname, broker.port)
    client.subscribe(listens_as.topic("command"), qos=1)
    client.loop_start()
    while not subscribed:
        time.sleep(0.01)
    try:
        yield commands
    finally:
        client.disconnect()
        client.loop_stop()


def test_a_command_gets_its_reply(broker):
    def answer(command):
        return [encode_reply(Reply(id=command.id, ok=True, result={"verb": command.verb}))]

    with (
        fake_device(broker, answer) as commands,
        Commander(broker.hostname, broker.port, clock=lambda: 1000.0) as commander,
    ):
        replies = [commander.send(CAMERA, verb, {"n": 1}, timeout_s=5) for verb in ("status", "rollback")]
    assert [reply.result["verb"] for reply in replies] == ["status", "rollback"]
    assert [command.arguments for command in commands] == [{"n": 1}, {"n": 1}]
    assert commands[0].expires == 1005.0
    assert commands[0].id != commands[1].id


def test_a_refusal_is_a_reply_too(broker):
    with (
        fake_device(broker, lambda c: [encode_reply(Reply(id=c.id, ok=False, error="no"))]),
        Commander(broker.hostname, broker.port) as commander,
    ):
        reply = commander.send(CAMERA, "learn", timeout_s=5)
    assert (reply.ok, reply.error) == (False, "no")


def test_only_the_right_reply_counts(broker):
    def answer(command):
        right = encode_reply(Reply(id=command.id, ok=True))
        return [encode_reply(Reply(id="another", ok=False)), b"{", right, encode_reply(Reply(id=command.id, ok=False))]

    with fake_device(broker, answer), Commander(broker.hostname, broker.port) as commander:
        assert commander.send(CAMERA, "status", timeout_s=5).ok


def test_silence_names_the_device_and_what_to_do(broker):
    with Commander(broker.hostname, broker.port) as commander, pytest.raises(CommandTimeoutError) as error:
        commander.send(CAMERA, "status", timeout_s=0.3)
    assert str(error.value) == (
        "greenhouse/cam-1: no answer to 'status' within 0.3 s; "
        "check on the monitor page that the device is online, then send it again"
    )
    assert isinstance(error.value, TimeoutError)
    assert (error.value.exit_code, error.value.device, error.value.verb) == (15, CAMERA, "status")


def test_an_unreadable_reply_is_told(broker):
    with (
        fake_device(broker, lambda command: [b"{}"]),
        Commander(broker.hostname, broker.port) as commander,
        pytest.raises(CommandTimeoutError, match=r"unreadable reply came: reply: schema None"),
    ):
        commander.send(CAMERA, "status", timeout_s=0.5)


def test_another_device_cannot_answer(broker):
    def answer(command):
        return [encode_reply(Reply(id=command.id, ok=True))]

    with (
        fake_device(broker, answer, replies_as=OTHER),
        Commander(broker.hostname, broker.port) as commander,
        pytest.raises(CommandTimeoutError),
    ):
        commander.send(CAMERA, "status", timeout_s=0.3)


def test_no_broker_is_one_clear_error():
    with bind_port("test", "127.0.0.1", 0) as nobody:
        port = nobody.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"broker 127.0.0.1:{port}: .*refused; check its address"):
            Commander("127.0.0.1", port).__enter__()


def test_a_broker_that_ends_is_told():
    with start_broker("auto") as running:
        commander = Commander(running.hostname, running.port)
        commander.__enter__()
    with pytest.raises((BrokerError, CommandTimeoutError)):
        commander.send(CAMERA, "status", timeout_s=0.5)
    commander.__exit__()
