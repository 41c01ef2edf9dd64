"""Telling systemd how the agent is: datagrams to the socket it names in `NOTIFY_SOCKET` (sd_notify(3), without libsystemd).

Without a socket every call does nothing, so the agent need not know who started it.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import field
from typing import Self

from device.contract.record import record

log = logging.getLogger(__name__)


class Notifier:
    """Speaks to the supervisor. What cannot be sent is logged once and never stops the agent."""

    def __init__(self, address: str = "") -> None:
        """Speak to a socket: a path, or `@NAME` for an abstract one; "" to nobody."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._is_silent = False

    def ready(self, status: str) -> None:
        """The start, or a reload, is over."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def reloading(self, status: str) -> None:
        """A reload begins; the time is what `Type=notify-reload` asks for."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS={_line(status)}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={_line(text)}")

    def beat(self) -> None:
        """Everything still moves."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
                connection.settimeout(1.0)  # a supervisor that does not read must not stop the agent
                connection.sendto(message.encode(), self._address)
            self._is_silent = False
        except OSError as error:
            if not self._is_silent:
                log.warning("the supervisor cannot be told (%s): %s", self._address.lstrip("\0"), error)
            self._is_silent = True


@record(frozen=True, slots=True, kw_only=True)
class Supervisor:
    """Who started the agent: how to speak to it, and within how many seconds it wants to hear; 0: it does not watch."""

    notifier: Notifier = field(default_factory=Notifier)
    watchdog_s: float = 0.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """What systemd says in `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`."""
        address = environment.get("NOTIFY_SOCKET", "")
        is_meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval = environment.get("WATCHDOG_USEC", "")
        watchdog_s = int(interval) / 1e6 if address and is_meant and interval.isdecimal() else 0.0
        return cls(notifier=Notifier(address), watchdog_s=watchdog_s)


def _line(text: str) -> str:
    return " ".join(text.split())
