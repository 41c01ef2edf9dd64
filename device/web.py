"""Files over `http:` and `https:`, with what a board in the field needs: ranges, deadlines, proxies, careful redirects.

`http.client` rather than urllib3, which python-tuf brings: a server that sends a byte now and then keeps within any
timeout between two bytes, in headers and chunk sizes too, so what comes from the socket is timed below the HTTP parser.
Trust comes from signatures, hence plain `http:` is as safe as a mirror on a stick; it only tells listeners what is fetched.
"""

import base64
import http.client
import io
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from device.contract.errors import ConfigError
from device.fetch import CHUNK_BYTES, CutOffError, FetchError, MissingError, RangeError

SLOW_BYTES_PER_S = 1024
"""In each window of waiting for the server, at least so much must come."""
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_MISSING = (403, 404, 410)  # 403: what an object store says of a file that is not there
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_PORTS = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}
_HEADERS = {"User-Agent": "fieldvit-device", "Accept-Encoding": "identity"}


class WebFetch:
    """Files below a URL. Keeps one connection; not for several threads at once.

    Args:
        url: `http:` or `https:`, the repository's directory.
        ca_file: certificates to trust in place of the system's.
    """

    is_near = False
    silence_s = 15.0
    """The longest pause between two bytes, and the longest wait for a connection."""
    slow_window_s = 20.0
    """After so much waiting for the server, what came is compared with `SLOW_BYTES_PER_S`."""

    def __init__(self, url: str, *, ca_file: Path | None = None) -> None:
        self.name = url
        self._base = url.rstrip("/") + "/"
        # a wrong file is told at once; the system's certificates take a while to read, and plain http: needs none
        self._tls = _tls_context(ca_file) if ca_file else None
        self._connection: http.client.HTTPConnection | None = None
        self._connected_to = ""

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        is_part = start > 0 or end is not None
        wanted = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if is_part else {}
        try:
            with _telling(path):
                response = self._follow(urljoin(self._base, quote(path)), _HEADERS | wanted)
                _require_wanted(response, path, start if is_part else None)
                yield from self._body(response, path, None if end is None else end - start)
        except BaseException:  # also when the reader has enough: the rest of this answer must not begin the next
            self.close()
            raise

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None

    def _body(self, response: http.client.HTTPResponse, path: str, expected: int | None) -> Iterator[bytes]:
        received = 0
        while chunk := response.read1(CHUNK_BYTES):
            received += len(chunk)
            if expected is not None and received > expected:
                raise FetchError("endless", f"{path} has more bytes than were asked for")
            yield chunk
        if response.length or (expected is not None and received < expected):
            raise CutOffError(f"{path} was cut off after {received} bytes")
        response.close()  # after its last byte: the connection is free for the next request

    def _follow(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request(url, headers)
            if response.status not in _REDIRECTS:
                return response
            self.close()
            url, came_from = urljoin(url, response.getheader("Location", "")), url
            if urlsplit(url).scheme not in (urlsplit(came_from).scheme, "https"):
                raise FetchError("unreachable", f"{came_from} redirects to {url}, which is not safer")
        raise FetchError("unreachable", f"{url}: more than {MAX_REDIRECTS} redirects")

    def _request(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """One answer; a connection that the server has closed since the last one is opened again."""
        is_kept = self._connection is not None
        try:
            return self._ask(url, headers)
        except (ConnectionError, http.client.BadStatusLine):
            if not is_kept:
                raise
        self.close()
        return self._ask(url, headers)

    def _ask(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise FetchError("unreachable", f"{url}: only http: and https: are followed")
        proxy = _proxy_of(parts.scheme, parts.hostname)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        if proxy and parts.scheme == "http":
            target, headers = url, headers | _proxy_login(proxy)
        connection = self._connect(parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme], proxy)
        connection.request("GET", target or "/", headers=headers)
        return connection.getresponse()

    def _connect(self, scheme: str, hostname: str, port: int, proxy: str) -> http.client.HTTPConnection:
        place = f"{scheme}://{hostname}:{port} {proxy}"
        if self._connection is None or self._connected_to != place:
            self.close()
            connection = self._new(scheme, hostname, port, proxy)
            try:
                connection.connect()
            except TimeoutError as error:
                raise CutOffError(f"{hostname}: no connection within {self.silence_s:.0f} s") from error
            self._connection, self._connected_to = connection, place
        return self._connection

    def _new(self, scheme: str, hostname: str, port: int, proxy: str) -> http.client.HTTPConnection:
        via = urlsplit(proxy) if proxy else None
        near = (via.hostname or "", via.port or 8080) if via else (hostname, port)
        connection: http.client.HTTPConnection
        if scheme == "https":
            self._tls = self._tls or _tls_context(None)
            connection = http.client.HTTPSConnection(*near, timeout=self.silence_s, context=self._tls)
            if via:
                connection.set_tunnel(hostname, port, _proxy_login(proxy))
        else:
            connection = http.client.HTTPConnection(*near, timeout=self.silence_s)
        connection.response_class = self._timed_response  # type: ignore[assignment]  # any callable does
        return connection

    def _timed_response(self, sock: socket.socket, *arguments: Any, **keywords: Any) -> http.client.HTTPResponse:
        return http.client.HTTPResponse(_Timed(sock, self.slow_window_s), *arguments, **keywords)  # type: ignore[arg-type]


class _Timed:
    """What HTTPResponse needs of a socket: a file to read from, which gives up when too little comes."""

    def __init__(self, sock: socket.socket, window_s: float) -> None:
        self._sock, self._window_s = sock, window_s

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedFile(self._sock.makefile(mode, buffering=0), self._window_s))  # type: ignore[call-overload]


class _TimedFile(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, window_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._raw, self._window_s, self._clock = raw, window_s, clock
        self._waited_s, self._received = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        started = self._clock()
        count = self._raw.readinto(buffer)
        self._waited_s += self._clock() - started
        self._received += count or 0
        if self._waited_s >= self._window_s:
            if self._received < SLOW_BYTES_PER_S * self._window_s:
                raise FetchError("slow", f"only {self._received} bytes came in {self._waited_s:.0f} s")
            self._waited_s, self._received = 0.0, 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


@contextmanager
def _telling(path: str) -> Iterator[None]:
    """Turn what sockets, TLS and HTTP raise into a FetchError that names the file."""
    try:
        yield
    except TimeoutError as error:
        raise FetchError("slow", f"{path}: the server is silent") from error
    except ssl.SSLCertVerificationError as error:
        raise FetchError("unreachable", f"{path}: {error.verify_message}; see update.ca_file") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CutOffError(f"{path}: {str(error) or type(error).__name__}") from error


def _require_wanted(response: http.client.HTTPResponse, path: str, start: int | None) -> None:
    """An answer other than the file, or the part of it that begins at `start`, is an error."""
    if response.status in _MISSING:
        raise MissingError(f"{path} is missing (HTTP {response.status})")
    if start is not None and response.status in (200, 416):
        raise RangeError(f"{path}: the server gives no range from byte {start} (HTTP {response.status})")
    if response.status != (200 if start is None else 206):
        raise CutOffError(f"{path}: HTTP {response.status} {response.reason}")
    if start is not None:
        found = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", ""))
        if not found or int(found[1]) != start:
            raise RangeError(f"{path}: the server gives another range than the one from byte {start}")


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{ca_file}: the update server's CA certificates cannot be read ({error}); see update.ca_file"
        ) from error


def _proxy_of(scheme: str, hostname: str) -> str:
    """The proxy that the environment names for a host, or nothing."""
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass(hostname):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_login(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if not parts.username:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
