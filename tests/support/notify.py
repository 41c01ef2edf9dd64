"""A real notify socket, as systemd opens one for a service."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.patience import PATIENCE


class NotifySocket:
    """Receives what a service says of itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.messages: list[dict[str, str]] = []

    def environment(self, *, watchdog_s: float = 0.0) -> dict[str, str]:
        """The environment that systemd gives the service."""
        added = {"NOTIFY_SOCKET": str(self.path)} | (
            {"WATCHDOG_USEC": str(int(watchdog_s * 1e6))} if watchdog_s else {}
        )
        return os.environ | added

    def wait_for(self, is_wanted: Callable[[dict[str, str]], bool], timeout_s: float = 20) -> dict[str, str]:
        """The next message of that kind."""
        timeout_s *= PATIENCE
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            try:
                text = self._socket.recv(4096).decode()
            except TimeoutError:
                break
            self.messages.append(dict(line.split("=", 1) for line in text.splitlines()))
            if is_wanted(self.messages[-1]):
                return self.messages[-1]
        raise TimeoutError(f"no such message within {timeout_s} s, but {self.messages[-10:]}")

    def close(self) -> None:
        self._socket.close()


@contextmanager
def notify_socket(directory: Path) -> Iterator[NotifySocket]:
    """Open one in a directory."""
    receiver = NotifySocket(directory / "notify")
    try:
        yield receiver
    finally:
        receiver.close()
