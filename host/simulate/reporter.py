"""What a simulated board says: state, events and telemetry, encoded by the contract's own code and put into the spool."""

import os
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

from device.contract.board import Board
from device.contract.messages import (
    Event,
    ModelState,
    State,
    Telemetry,
    encode_event,
    encode_state,
    encode_telemetry,
)
from device.contract.topics import DeviceId
from host.simulate.ledger import Ledger
from host.simulate.models import Models
from host.simulate.spool import HIGH, LOW, Spool

RUNTIME = "simulated"


class Reporter:
    """Speaks for one board over all its boots.

    Args:
        device: who speaks.
        board: its profile.
        spool: where messages go.
        ledger: where they are counted.
        cuts_next: whether the link is lost with the next numbered message.
        clock: the board's wall clock, Unix seconds.
        send: has the connection look into the spool.
    """

    def __init__(
        self,
        device: DeviceId,
        board: Board,
        *,
        spool: Spool,
        ledger: Ledger,
        cuts_next: Callable[[], bool],
        clock: Callable[[], float],
        send: Callable[[], None],
    ) -> None:
        self._device, self._board, self._spool, self._ledger = device, board, spool, ledger
        self._cuts_next, self._clock, self._send = cuts_next, clock, send
        self.begin_boot()

    @property
    def boot(self) -> str:
        return self._boot.boot

    def begin_boot(self) -> None:
        """Take a new boot id, and count from 1. It is by chance, not from the seed: no two runs may share one."""
        self._boot = self._ledger.begin(os.urandom(8).hex())

    def event(self, kind: str, **data: Any) -> None:
        """Something happened."""
        moment, boot = self._clock(), self.boot
        self._put(
            "event",
            lambda sequence: encode_event(
                self._device, Event(kind=kind, boot=boot, sequence=sequence, time=moment, data=data)
            ),
            priority=HIGH,
        )

    def telemetry(self, values: dict[str, float]) -> None:
        """Report a window, and with it how the spool is doing."""
        values |= {"spool/depth": float(self._spool.depth), "spool/dropped": float(self._spool.dropped)}
        moment, boot = self._clock(), self.boot
        self._put(
            "telemetry",
            lambda sequence: encode_telemetry(
                self._device, Telemetry(boot=boot, sequence=sequence, time=moment, values=values)
            ),
            priority=LOW,
        )

    def birth(self, models: Models) -> bytes:
        """The retained online state."""
        slot, head = models.slots.serving, models.head
        model = ModelState(
            name=head.release.name,
            version=head.release.version,
            release=head.release.release,
            precision=slot.precision,
            backbone=head.backbone,
        )
        return encode_state(
            State(
                status="online",
                boot=self.boot,
                time=self._clock(),
                agent_version=fieldvit_version(),
                board=self._board.name,
                slot=slot.slot,
                model=model,
                labels=head.labels,
                learned_version=head.version,
                runtime=RUNTIME,
                delegate=self._board.runtime.delegate,
            )
        )

    def offline(self) -> bytes:
        """The last will, and the goodbye."""
        return encode_state(State(status="offline", boot=self.boot))

    def _put(self, kind: str, build: Callable[[int], bytes], *, priority: int) -> None:
        sequence = self._boot.next_number()
        self._spool.put(
            kind,
            build(sequence),
            priority=priority,
            boot=self._boot,
            sequence=sequence,
            is_cut=self._cuts_next(),
        )
        self._send()


@cache
def fieldvit_version() -> str:
    """The installed distribution's version; "unknown" where it runs from a source tree."""
    try:
        return metadata.version("fieldvit")
    except metadata.PackageNotFoundError:
        return "unknown"
