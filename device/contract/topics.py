"""MQTT topics: `fieldvit/v1/SITE/DEVICE/KIND`."""

import re
from dataclasses import dataclass

from device.contract.errors import MessageError

ROOT = "fieldvit/v1"
KINDS = ("state", "telemetry", "event", "result", "command", "reply", "frame")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_id(text: str) -> bool:
    """Whether a site, device or channel id is well formed."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class DeviceId:
    """Which device, at which site."""

    site: str
    device: str

    def __post_init__(self) -> None:
        for name, value in (("site", self.site), ("device", self.device)):
            if not is_id(value):
                raise MessageError(f"{name} id {value!r} must match {_ID.pattern}")

    def topic(self, kind: str) -> str:
        """The topic of one kind of message of this device."""
        if kind not in KINDS:
            raise MessageError(f"topic kind {kind!r} is unknown; kinds are {', '.join(KINDS)}")
        return f"{ROOT}/{self.site}/{self.device}/{kind}"

    def __str__(self) -> str:
        return f"{self.site}/{self.device}"


def parse_topic(topic: str) -> tuple[DeviceId, str]:
    """Split a topic into device and kind; MessageError if it is not ours."""
    parts = topic.split("/")
    if len(parts) != 5 or "/".join(parts[:2]) != ROOT or parts[4] not in KINDS:
        raise MessageError(f"topic {topic!r} is not {ROOT}/SITE/DEVICE/KIND")
    return DeviceId(parts[2], parts[3]), parts[4]
