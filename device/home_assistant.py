"""Home Assistant finds the board by itself: retained discovery messages, one for each figure, and an `update` entity.

They point at the topics that the board publishes anyway (`state` and `telemetry`), so nothing is said twice. Only the versions
for the `update` entity have a topic of their own, `PREFIX/update/NODE/state`, below Home Assistant's prefix because they are
in its format. The entity's *Install* button sends `install` to `PREFIX/update/NODE/install`, upon which the board looks for an
update as after `fieldvit-device update`: signatures decide what is installed, not the button. A broker with access rules
must let the board write `PREFIX/+/NODE/#` and read the last. Payloads as Home Assistant documents them for MQTT discovery.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from device.contract.record import record
from device.contract.topics import DeviceId

INSTALL = b"install"


@record(frozen=True, slots=True, kw_only=True)
class Sensor:
    """One figure: `record` is its name in the telemetry pack."""

    key: str
    name: str
    record: str
    unit: str | None = None
    device_class: str | None = None
    state_class: str = "measurement"
    factor: float = 1.0
    is_diagnostic: bool = False


SENSORS = (
    Sensor(key="frames", name="Frames", record="frames"),
    Sensor(key="throughput", name="Throughput", record="throughput", unit="fps"),
    Sensor(key="latency", name="Latency (p50)", record="latency/p50", unit="ms", device_class="duration", factor=1000),
    Sensor(key="confidence", name="Confidence", record="confidence", unit="%", factor=100),
    Sensor(key="drift", name="Drift", record="drift"),
    Sensor(key="errors", name="Errors", record="errors", is_diagnostic=True),
    Sensor(key="memory", name="Memory", record="memory", unit="B", device_class="data_size", is_diagnostic=True),
    Sensor(key="spool", name="Messages waiting", record="spool/depth", is_diagnostic=True),
    Sensor(key="temperature", name="Processor", record="temperature", unit="°C", device_class="temperature"),
)


def discovery(device: DeviceId, *, prefix: str, board: str, agent_version: str) -> Iterator[tuple[str, bytes]]:
    """The retained messages, as (topic, payload).

    Args:
        device: whose topics.
        prefix: Home Assistant's discovery prefix.
        board: the profile's description.
        agent_version: of the runtime.
    """
    node = node_id(device)
    shared = {
        "availability": [{"topic": device.topic("state"), "value_template": "{{ value_json.status }}"}],
        "device": {
            "identifiers": [node],
            "name": f"{device.device} ({device.site})",
            "manufacturer": "FieldViT",
            "model": board,
            "sw_version": agent_version,
        },
        "origin": {"name": "FieldViT", "sw_version": agent_version},
    }
    for sensor in SENSORS:
        yield f"{prefix}/sensor/{node}/{sensor.key}/config", _encode(_sensor(device, node, sensor) | shared)
    yield f"{prefix}/update/{node}/model/config", _encode(_update(prefix, node) | shared)


def node_id(device: DeviceId) -> str:
    """The board's name for Home Assistant; no two boards share one, though ids may hold `_`."""
    return f"fieldvit_{len(device.site)}_{device.site}_{device.device}"


def state_topic(device: DeviceId, prefix: str) -> str:
    """Where the versions are published."""
    return f"{prefix}/update/{node_id(device)}/state"


def install_topic(device: DeviceId, prefix: str) -> str:
    """Where the button's press arrives."""
    return f"{prefix}/update/{node_id(device)}/install"


def update_state(installed: str, latest: str, *, is_busy: bool) -> bytes:
    """What the `update` entity shows; versions of the model."""
    return _encode({"installed_version": installed, "latest_version": latest or installed, "in_progress": is_busy})


def _sensor(device: DeviceId, node: str, sensor: Sensor) -> dict[str, Any]:
    """The value is found in the SenML pack by its name; a pack without it leaves the sensor as it is."""
    found = f"value_json | selectattr('n', 'defined') | selectattr('n', 'eq', '{sensor.record}') | list"
    factor = f" * {sensor.factor:g}" if sensor.factor != 1 else ""
    template = f"{{% set found = {found} %}}{{{{ (found[0].v{factor}) | round(3) if found else this.state }}}}"
    table = {
        "name": sensor.name,
        "unique_id": f"{node}_{sensor.key}",
        "object_id": f"{node}_{sensor.key}",
        "state_topic": device.topic("telemetry"),
        "value_template": template,
        "state_class": sensor.state_class,
        "unit_of_measurement": sensor.unit,
        "device_class": sensor.device_class,
        "entity_category": "diagnostic" if sensor.is_diagnostic else None,
    }
    return {key: value for key, value in table.items() if value is not None}


def _update(prefix: str, node: str) -> dict[str, Any]:
    return {
        "name": "Model",
        "unique_id": f"{node}_model",
        "object_id": f"{node}_model",
        "state_topic": f"{prefix}/update/{node}/state",
        "command_topic": f"{prefix}/update/{node}/install",
        "payload_install": INSTALL.decode(),
    }


def _encode(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
