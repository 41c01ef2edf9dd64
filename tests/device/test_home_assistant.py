"""Discovery messages: unique, complete, and templates that find what the board really sends."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from jinja2.sandbox import SandboxedEnvironment

from device.contract.messages import State, Telemetry, encode_state, encode_telemetry
from device.contract.topics import DeviceId
from device.home_assistant import SENSORS, discovery, install_topic, node_id, state_topic, update_state
from device.slots import Slots
from tests.support.agent import Field
from tests.support.broker import listen

DEVICE = DeviceId("green_house", "cam-1")
VALUES = {"frames": 12.0, "latency/p50": 0.0215, "latency/p99": 0.1, "confidence": 0.875, "temperature": 51.5}


def configs() -> dict[str, dict[str, Any]]:
    found = discovery(DEVICE, prefix="homeassistant", board="a board", agent_version="1.0")
    return {topic: json.loads(payload) for topic, payload in found}


def render(template: str, payload: bytes, state: str = "unknown") -> str:
    """As Home Assistant does: `value_json` is the payload, `this` the entity."""
    environment = SandboxedEnvironment()
    return environment.from_string(template).render(value_json=json.loads(payload), this={"state": state})


def test_every_figure_and_the_update_entity_are_announced():
    found = configs()
    assert len(found) == len(SENSORS) + 1
    assert len({table["unique_id"] for table in found.values()}) == len(found)
    for topic, table in found.items():
        component, node, key = topic.removeprefix("homeassistant/").removesuffix("/config").split("/")
        assert (component, node) == ("update" if key == "model" else "sensor", node_id(DEVICE))
        assert table["device"]["identifiers"] == [node_id(DEVICE)]
        assert table["origin"]["name"] == "FieldViT"


@pytest.mark.parametrize(
    ("key", "expected"), [("frames", "12.0"), ("latency", "21.5"), ("confidence", "87.5"), ("temperature", "51.5")]
)
def test_the_templates_find_the_figures(key: str, expected: str):
    table = configs()[f"homeassistant/sensor/{node_id(DEVICE)}/{key}/config"]
    payload = encode_telemetry(DEVICE, Telemetry(boot="0" * 16, sequence=1, time=1.0, values=VALUES))
    assert table["state_topic"] == DEVICE.topic("telemetry")
    assert render(table["value_template"], payload) == expected


def test_a_figure_that_is_missing_leaves_the_sensor_as_it_is():
    table = configs()[f"homeassistant/sensor/{node_id(DEVICE)}/drift/config"]
    payload = encode_telemetry(DEVICE, Telemetry(boot="0" * 16, sequence=1, time=1.0, values=VALUES))
    assert render(table["value_template"], payload, state="0.25") == "0.25"


def test_availability_follows_the_state_and_the_will():
    table = configs()[f"homeassistant/sensor/{node_id(DEVICE)}/frames/config"]
    (availability,) = table["availability"]
    assert availability["topic"] == DEVICE.topic("state")
    will = encode_state(State(status="offline", boot="0" * 16))
    assert render(availability["value_template"], will) == "offline"


def test_the_update_entity_has_its_topics():
    table = configs()[f"homeassistant/update/{node_id(DEVICE)}/model/config"]
    assert table["state_topic"] == state_topic(DEVICE, "homeassistant")
    assert table["command_topic"] == install_topic(DEVICE, "homeassistant")
    assert table["payload_install"] == "install"
    state: Mapping[str, Any] = json.loads(update_state("1.0.0", "", is_busy=True))
    assert state == {"installed_version": "1.0.0", "latest_version": "1.0.0", "in_progress": True}


def test_an_agent_is_discovered_and_its_button_updates(field: Field, broker_port: int):
    field.configure(port=broker_port)
    with (field.root / "agent.toml").open("a") as config:
        config.write("\n[home_assistant]\nenabled = true\n")
    board = DeviceId("lab", "cam-1")
    field.cli("update")
    with listen(broker_port, f"homeassistant/update/{node_id(board)}") as listener:
        listener.client.publish(install_topic(board, "homeassistant"), "install", qos=1, retain=True).wait_for_publish(
            5
        )
        with field.agent():
            assert json.loads(listener.wait_for("config"))["name"] == "Model"
            listener.wait_for("state", has_versions("1.0.0", "1.0.0"))
            field.publish(2)
            listener.client.publish(install_topic(board, "homeassistant"), "fly", qos=1).wait_for_publish(5)
            time.sleep(0.5)
            assert Slots(field.root).serving().release == 1  # nor has the retained one been obeyed
            listener.client.publish(install_topic(board, "homeassistant"), "install", qos=1).wait_for_publish(5)
            listener.wait_for("state", has_versions("2.0.0", "2.0.0"))
        listener.client.publish(install_topic(board, "homeassistant"), b"", retain=True).wait_for_publish(5)


def has_versions(installed: str, latest: str) -> Callable[[bytes], bool]:
    def matches(payload: bytes) -> bool:
        table = json.loads(payload)
        return (table["installed_version"], table["latest_version"]) == (installed, latest)

    return matches


def test_no_two_boards_share_a_name():
    assert node_id(DeviceId("a_b", "c")) != node_id(DeviceId("a", "b_c"))
