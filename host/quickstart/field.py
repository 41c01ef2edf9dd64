"""The field part of the quickstart: switch a board on, watch it, teach it, attack it.

Everything about the board's answers is measured by device processes (the agent, and `fieldvit-device infer` on the same
data directory); this module only compares labels.
"""

import json
import os
import shutil
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np

from device.contract.topics import DeviceId
from host.data.splits import ImageSplits
from host.errors import FleetError
from host.fleet.commands import Commander
from host.fleet.flash import BoardSettings, BrokerSettings, flash_directory
from host.fleet.repository import UpdateRepository
from host.pipeline import Report
from host.quickstart.bad_updates import broken_inside, damaged_on_the_way, wrongly_signed
from host.quickstart.frames import write_frames
from host.quickstart.processes import DeviceCommand, wait_for

CHANNEL = "stable"
BOARD = "generic-x86-64"
DEVICE = DeviceId("quickstart", "board-1")
LABELS_PER_CLASS = 20
_REPLY_S = 60.0
_FRAMES_S = 120.0
_EVENTS_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a device process answered for a directory of frames, in the order of the frames."""

    labels: tuple[str, ...]
    latencies_ms: tuple[float, ...]
    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BadUpdate:
    """One attack: what was done, the board's reason and words, and whether it refused for the right reason and serves on."""

    name: str
    refused: bool
    reason: str
    words: str


@dataclass(slots=True, kw_only=True)
class FieldRecord:
    """What happened in the field."""

    float_before: Answers
    int8_before: Answers
    int8_after: Answers
    lessons: list[str] = field(default_factory=list)
    bad_updates: list[BadUpdate] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    page: str = ""


class FieldTrial:
    """One board, its agent and its monitor, both running."""

    def __init__(
        self, directory: Path, *, bundle: Path, device: DeviceCommand, monitor: dict[str, Any], report: Report
    ) -> None:
        self.directory, self.bundle, self.device, self.monitor, self.report = directory, bundle, device, monitor, report
        self.repository = UpdateRepository.open_or_create(directory / "updates", directory / "keys")
        self.log = directory / "agent.log"

    def flash(self) -> None:
        """Publish the bundle and prepare the board's directory."""
        self.repository.publish(self.bundle, CHANNEL)
        broker = self.monitor["broker"]
        settings = BoardSettings(
            id=DEVICE,
            board=BOARD,
            channel=CHANNEL,
            broker=BrokerSettings(hostname=broker["hostname"], port=broker["port"]),
        )
        flash_directory(self.bundle, self.device.root, repository=self.repository.directory, settings=settings)

    def stream(self, name: str, images: np.ndarray, agent: "Popen[bytes]") -> list[str]:
        """Put frames before the board's camera and wait until it has seen them all; returns the frame ids."""
        names = [f"{index:04d}" for index in range(len(images))]
        target = self._frames_seen() + len(images)
        write_frames(self.device.root / "frames" / name, images, names)

        def seen() -> bool:
            self.report("field", min(self._frames_seen(), target), target, f"board watches '{name}'")
            return self._frames_seen() >= target

        wait_for(seen, process=agent, log=self.log, name="agent", timeout_s=_FRAMES_S)
        return [f"{name}/{frame}" for frame in names]

    def wait_until_confirmed(self, agent: "Popen[bytes]") -> None:
        """Wait until the first bundle has proved itself on the board."""
        wait_for(
            lambda: self._live().get("state") == "confirmed", process=agent, log=self.log, name="agent", timeout_s=60
        )

    def infer(self, name: str, *, precision: str = "") -> Answers:
        """Let a device process answer for the frames of one stream."""
        words = ["infer", str(self.device.root / "frames" / name), *(["--precision", precision] if precision else [])]
        answer = self.device.json(*words)
        latency = answer["latency_ms"]
        return Answers(
            labels=tuple(result["label"] for result in answer["results"]),
            latencies_ms=tuple(result["latency_ms"] for result in answer["results"]),
            p50_ms=latency["p50"],
            p90_ms=latency["p90"],
            p99_ms=latency["p99"],
        )

    def teach(self, frames: dict[str, list[str]]) -> list[str]:
        """Send the operator's labels, by frame id; returns what the board replied, one line per class."""
        lines = []
        with self._commander() as commander:
            for label, frame_ids in frames.items():
                reply = commander.send(DEVICE, "learn", {"frame_ids": frame_ids, "label": label}, timeout_s=_REPLY_S)
                if not reply.ok:
                    raise FleetError(f"{DEVICE}: refused to learn {label!r}: {reply.error}")
                lines.append(f"{label}: {len(frame_ids)} frames")
        return lines

    def attack(self) -> list[BadUpdate]:
        """Push three bad updates, one after the other."""
        stranger = wrongly_signed(self.bundle, self.directory, CHANNEL)
        broken = broken_inside(self.bundle, self.directory, self.repository, CHANNEL)
        damaged = damaged_on_the_way(self.repository.directory, broken.name, self.directory)
        return [
            self._push("signed with keys the board does not trust", stranger, expected="signature"),
            self._push("one byte changed on the way", damaged, expected="checksum"),
            self._push("properly signed, weights broken", self.repository.directory, expected="selftest"),
        ]

    def events(self) -> list[dict[str, Any]]:
        """The board's events as the monitor keeps them, oldest first."""
        url = f"{self.monitor['page'].rstrip('/')}/api/devices/{DEVICE}"
        with urllib.request.urlopen(url, timeout=10) as response:  # our own monitor on loopback
            events: list[dict[str, Any]] = json.load(response)["events"]
        return sorted(events, key=lambda event: (event["time"], event["sequence"]))

    def _refusals(self) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["kind"] == "refused"]

    def _wait_for_refusals(self, count: int) -> list[dict[str, Any]]:
        """The refusals that reached the monitor, once there are `count`, or after a while."""
        deadline = time.monotonic() + _EVENTS_S
        while len(refusals := self._refusals()) < count and time.monotonic() < deadline:
            time.sleep(0.1)
        return refusals

    def _push(self, name: str, repository: Path, *, expected: str) -> BadUpdate:
        before, refusals = self._serving(), len(self._refusals())
        source = f"dir:{os.path.relpath(repository, self.device.root)}"
        with self._commander() as commander:
            reply = commander.send(DEVICE, "update", {"source": source}, timeout_s=_REPLY_S)
        reasons = [event["data"].get("reason") for event in self._wait_for_refusals(refusals + 1)[refusals:]]
        refused = not reply.ok and reasons == [expected] and self._serving() == before
        return BadUpdate(
            name=name, refused=refused, reason=", ".join(map(str, reasons)), words=reply.error or "accepted"
        )

    def _serving(self) -> tuple[Any, ...]:
        status = self.device.json("status")
        return tuple(status[key] for key in ("name", "version", "release", "precision", "slot", "state"))

    def _commander(self) -> Commander:
        return Commander(self.monitor["broker"]["hostname"], self.monitor["broker"]["port"])

    def _live(self) -> dict[str, Any]:
        try:
            live: dict[str, Any] = json.loads((self.device.root / "agent.json").read_text())
        except FileNotFoundError:
            return {}
        return live

    def _frames_seen(self) -> int:
        return int(self._live().get("frames", 0))


def run_trial(trial: FieldTrial, agent: "Popen[bytes]", split: ImageSplits, report: Report) -> FieldRecord:
    """Do the whole field part against a running agent."""
    test = split.test
    trial.stream("before", test.images, agent)
    trial.wait_until_confirmed(agent)
    float_before, int8_before = trial.infer("before", precision="float32"), trial.infer("before")
    shown, labels = first_of_each_class(split, LABELS_PER_CLASS)
    frame_ids = trial.stream("lesson", shown, agent)
    by_label = {
        label: [frame for frame, own in zip(frame_ids, labels, strict=True) if own == label]
        for label in dict.fromkeys(labels)
    }
    lessons = trial.teach(by_label)
    int8_after = trial.infer("before")
    trial.stream("after", test.images, agent)
    bad_updates = trial.attack()
    return FieldRecord(
        float_before=float_before,
        int8_before=int8_before,
        int8_after=int8_after,
        lessons=lessons,
        bad_updates=bad_updates,
        events=trial.events(),
        status=trial.device.json("status"),
        page=trial.monitor["page"],
    )


def first_of_each_class(split: ImageSplits, count: int) -> tuple[np.ndarray, list[str]]:
    """The first `count` images of each held-back class, class after class, and their labels."""
    classes = np.unique(split.field.labels)
    chosen = np.concatenate([np.flatnonzero(split.field.labels == label)[:count] for label in classes])
    return split.field.images[chosen], [split.label_names[split.field.labels[index]] for index in chosen]


def fresh_directory(path: Path) -> Path:
    """An empty directory; what an interrupted run left there goes."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
