"""A web server on loopback that serves a directory, with ranges, and with the faults a test asks for."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Site:
    """What is served, how badly, and what was asked for. Faults hold for paths that contain `where`."""

    directory: Path
    url: str = ""
    where: str = "targets/"
    has_ranges: bool = True
    cut_after: int | None = None
    """Bytes of a body after which the connection breaks."""
    endless: bool = False
    drip_s: float = 0.0
    """Seconds between two bytes of a body."""
    drip_headers: bool = False
    redirect_to: str = ""
    status: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and range of each request."""
    sent: int = 0
    """Bytes of bodies."""
    connections: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def asked(self, part: str) -> list[str]:
        """The ranges that were asked for of paths with `part` in them."""
        return [wanted for path, wanted in self.requests if part in path]


@contextmanager
def serve(directory: Path) -> Iterator[Site]:
    """Serve a directory until the block ends."""
    site = Site(directory)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    server.block_on_close = False
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            site.connections += 1

        def do_GET(self) -> None:  # the name http.server calls
            wanted = self.headers.get("Range", "")
            site.requests.append((self.path, wanted))
            is_faulty = site.where in self.path
            path = site.directory / self.path.lstrip("/")
            if is_faulty and site.status:
                self._empty(site.status)
            elif is_faulty and site.redirect_to:
                self._empty(302, Location=site.redirect_to + self.path)
            elif not path.is_file():
                self._empty(404)
            else:
                self._send(path.read_bytes(), wanted, is_faulty)

        def _send(self, content: bytes, wanted: str, is_faulty: bool) -> None:
            found = _RANGE.fullmatch(wanted) if site.has_ranges else None
            start, end = (int(found[1]), int(found[2] or len(content) - 1) + 1) if found else (0, len(content))
            if found and start >= len(content):
                self._empty(416)
                return
            body = content[start:end]
            headers = {"Content-Length": "1000000000000" if is_faulty and site.endless else str(len(body))}
            if found:
                headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
            if is_faulty and site.drip_headers:
                self._drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000, 0.02)
            self.send_response(206 if found else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if is_faulty and site.drip_s:
                self._drip(body, site.drip_s)
            elif is_faulty and site.endless:
                while not site.stopping.is_set():
                    self._write(body or b"x")
            elif is_faulty and site.cut_after is not None and len(body) > site.cut_after:
                self._write(body[: site.cut_after])
                self.wfile.flush()
                self.close_connection = True
            else:
                self._write(body)

        def _drip(self, body: bytes, pause_s: float) -> None:
            for byte in body:
                if site.stopping.is_set():
                    return
                self._write(bytes([byte]))
                self.wfile.flush()
                time.sleep(pause_s)

        def _write(self, body: bytes) -> None:
            self.wfile.write(body)
            site.sent += len(body)

        def _empty(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def handle(self) -> None:
            with suppress(ConnectionError, TimeoutError):  # the client had enough
                super().handle()

        def finish(self) -> None:
            with suppress(ConnectionError, TimeoutError):
                super().finish()

        def log_message(self, *_: Any) -> None: ...

    return Handler
