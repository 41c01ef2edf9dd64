"""A TCP proxy that misbehaves on demand: holds everything back, slows down, or cuts connections."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 4096
TICK_S = 0.02


class Network:
    """Everything that passes between clients and one server port. `port` is where clients connect."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._is_open = threading.Event()
        self._is_open.set()
        self._bytes_per_s = 0.0
        self._delay_s = 0.0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, name="network", daemon=True).start()

    def partition(self) -> None:
        """Let nothing through: connections stay, and are accepted, but no byte passes."""
        self._is_open.clear()

    def heal(self) -> None:
        """Let what was held back through, at full speed."""
        self._bytes_per_s = self._delay_s = 0.0
        self._is_open.set()

    def slow_down(self, bytes_per_s: float, delay_s: float) -> None:
        """Each direction of each connection takes this long."""
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s

    def cut(self) -> None:
        """Reset every connection; what was held back is lost, as behind a router that forgot it."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for side in sockets:
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()

    def close(self) -> None:
        self._server.close()
        self.heal()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), name="network", daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._is_open.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._sockets |= {client, server}
        threading.Thread(target=self._carry, args=(client, server), name="network", daemon=True).start()
        self._carry(server, client)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError, ValueError):
            while data := source.recv(CHUNK):
                self._is_open.wait()
                if self._bytes_per_s:
                    time.sleep(self._delay_s + len(data) / self._bytes_per_s)
                sink.sendall(data)
        with self._lock:
            self._sockets -= {source, sink}
        for side in (source, sink):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


@contextmanager
def network(target: int) -> Iterator[Network]:
    """A network in front of a port of this machine, until the block ends."""
    made = Network(target)
    try:
        yield made
    finally:
        made.close()
