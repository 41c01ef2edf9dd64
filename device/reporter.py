"""What the agent says: state, events and telemetry, built here and put into the spool."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from device.contract.messages import Event, ModelState, State, Telemetry, encode_event, encode_state, encode_telemetry
from device.contract.topics import DeviceId
from device.journal import Entry
from device.modules import forbidden_modules
from device.runtime import runtime_name
from device.serving import Model
from device.slots import CRASHED, Slots
from device.spool import LOW, Spool
from device.telemetry import memory_bytes, soc_temp_celsius

log = logging.getLogger(__name__)


class Reporter:
    """Speaks for one device during one boot of its agent."""

    def __init__(
        self, device: DeviceId, board: str, boot: str, spool: Spool, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.device, self._board, self.boot, self._spool, self._clock = device, board, boot, spool, clock

    def event(self, kind: str, **data: Any) -> None:
        """Something happened."""
        log.info("event %s: %s", kind, data)
        self._spool.put_numbered("event", lambda sequence: self._event(sequence, kind, data, self._clock()))

    def journal(self, slots: Slots) -> None:
        """Report the slots' changes of state that were not reported yet: each once, also those from before a crash."""
        mark = self._spool.journal_mark
        for entry in slots.history(after=mark):
            kind = event_kind(entry)
            self._spool.put_journaled(entry.number, self._event_of(entry, kind) if kind else None)

    def telemetry(self, model: Model | None, *, errors: int, lost: Mapping[str, int]) -> dict[str, float]:
        """Close the model's window and report it.

        Args:
            model: whose window.
            errors: how many there were since the last one.
            lost: which of them were bad frames of what reason, and how many frames were dropped (`Tally.window`).

        Returns:
            The values.
        """
        values = model.window.close() if model else {"frames": 0.0}
        values |= {name: float(count) for name, count in lost.items()}
        values |= {"errors": float(errors), "memory": float(memory_bytes())}
        values |= {"spool/depth": float(self._spool.depth), "spool/dropped": float(self._spool.dropped)}
        temperature = soc_temp_celsius()
        if temperature is not None:
            values["temperature"] = temperature
        if model:
            values["learned/version"] = float(model.classifier.head.version)
        now = self._clock()
        self._spool.put_numbered(
            "telemetry",
            lambda sequence: encode_telemetry(
                self.device, Telemetry(boot=self.boot, sequence=sequence, time=now, values=values)
            ),
            priority=LOW,
        )
        return values

    def birth(self, model: Model | None) -> bytes:
        """The retained online state."""
        head = model.classifier.head if model else None
        return encode_state(
            State(
                status="online",
                boot=self.boot,
                time=self._clock(),
                agent_version=agent_version(),
                board=self._board,
                slot=model.slot if model else None,
                model=model_state(model) if model else None,
                labels=head.labels if head else (),
                learned_version=head.version if head else 0,
                forbidden_modules=tuple(forbidden_modules()),
                runtime=runtime_name(),
                delegate=model.engine.delegate if model else "",
            )
        )

    def offline(self) -> bytes:
        """The last will, and the goodbye."""
        return encode_state(State(status="offline", boot=self.boot))

    def _event(self, sequence: int, kind: str, data: dict[str, Any], moment: float) -> bytes:
        return encode_event(self.device, Event(kind=kind, boot=self.boot, sequence=sequence, time=moment, data=data))

    def _event_of(self, entry: Entry, kind: str) -> Callable[[int], bytes]:
        names = ("slot", "name", "version", "release", "precision", "reason", "detail")
        data = {name: value for name in names if (value := getattr(entry, name))}
        log.info("event %s: %s", kind, data)
        return lambda sequence: self._event(sequence, kind, data, entry.time)


def event_kind(entry: Entry) -> str | None:
    """The event that a journal entry stands for, if any."""
    if entry.state == entry.was:  # a start on a model in testing, or on a confirmed one after a crash
        return "error" if entry.reason == CRASHED else None
    if entry.state == "testing":
        return "installed"
    if entry.state == "confirmed":
        return "confirmed"
    if entry.state == "rejected":
        return "rolled-back" if entry.was in ("testing", "confirmed") else "refused"
    return None


def model_state(model: Model) -> ModelState:
    manifest, artifact = model.manifest, model.artifact
    return ModelState(
        name=manifest.name,
        version=manifest.version,
        release=manifest.release,
        precision=artifact.precision,
        backbone=artifact.backbone,
    )


@cache
def agent_version() -> str:
    """The installed distribution's version; "unknown" when the agent runs from a source tree."""
    from importlib import metadata  # here: the first frame need not wait for it

    try:
        return metadata.version("fieldvit")
    except metadata.PackageNotFoundError:
        return "unknown"
