"""The enrolment service: a few requests a day over HTTPS, with the broker's server certificate.

GET  /ca.pem    the authority; a board compares it with the hash in its token
POST /enrol     {"site", "device", "token", "csr"} -> certificate, broker, times
POST /renew     {"csr"}, over a connection that presents the certificate to renew -> the same

Refusals are `{"error": TEXT}` with status 4xx. Requests are small, quick and few at a time; anything else is cut off.
"""

import json
import logging
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, socket
from typing import Any

from host.errors import FleetError
from host.fleet.site import Site

MAX_BODY_BYTES = 32 << 10
TIMEOUT_S = 10.0
MAX_REQUEST_S = 30.0
MAX_AT_ONCE = 32

logger = logging.getLogger(__name__)


class EnrolmentServer(ThreadingHTTPServer):
    """Serves one site; TLS is agreed in the request's own thread, so that one slow client holds up nobody."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, site: Site, hostname: str, port: int) -> None:
        self.site = site
        self._context = _server_context(site)
        self._places = threading.BoundedSemaphore(MAX_AT_ONCE)
        super().__init__((hostname, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        held: list[socket] = [request]
        limit = threading.Timer(MAX_REQUEST_S, lambda: _hang_up(held[0]))  # one byte now and then is not enough
        limit.daemon = True
        limit.start()
        try:
            request.settimeout(TIMEOUT_S)
            held[0] = self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            held[0].do_handshake()
        except OSError as error:  # also what is no TLS at all
            logger.info("enrolment: a connection came to nothing (%s)", error)
            self.shutdown_request(held[0])
        else:
            super().process_request_thread(held[0], client_address)
        finally:
            limit.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("enrolment: a request from %s failed", client_address[0])


@contextmanager
def serve_enrolment(site: Site, hostname: str, port: int) -> Iterator[int]:
    """Serve until the block ends; yields the port (0 takes a free one). FleetError when the port is taken."""
    try:
        server = EnrolmentServer(site, hostname, port)
    except OSError as error:
        raise FleetError(
            f"enrolment service: {hostname}:{port} cannot be used ({error}); choose another --port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="enrolment", kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join(timeout=5)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: EnrolmentServer
    protocol_version = "HTTP/1.0"  # one request a connection
    timeout = TIMEOUT_S
    server_version, sys_version = "fieldvit", ""

    def do_GET(self) -> None:
        if self.path == "/ca.pem":
            self._send(HTTPStatus.OK, self.server.site.authority_pem.encode(), "application/x-pem-file")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is only /ca.pem, /enrol and /renew")

    def do_POST(self) -> None:
        handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"/enrol": self._enrol, "/renew": self._renew}
        handler = handlers.get(self.path)
        if handler is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is only /ca.pem, /enrol and /renew")
            return
        try:
            answer = handler(self._body())
        except FleetError as error:
            logger.warning("enrolment: refused %s: %s", self.client_address[0], error)
            self._refuse(HTTPStatus.FORBIDDEN, str(error))
            return
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")

    def _enrol(self, body: dict[str, Any]) -> dict[str, Any]:
        site, device, token, request = _texts(body, "site", "device", "token", "csr")
        if site != self.server.site.name:
            raise FleetError(f"this is the site {self.server.site.name!r}, not {site[:64]!r}")
        answer = self.server.site.enrol(device, token, request)
        logger.info("enrolment: %s/%s enrolled", site, device)
        return answer

    def _renew(self, body: dict[str, Any]) -> dict[str, Any]:
        (request,) = _texts(body, "csr")
        certificate = self.connection.getpeercert()  # type: ignore[attr-defined]  # a TLS socket
        if not certificate:
            raise FleetError("renewal needs the certificate that is to be renewed, on the TLS connection")
        names = [value for part in certificate["subject"] for key, value in part if key == "commonName"]
        device = names[0] if len(names) == 1 else ""
        answer = self.server.site.renew(certificate["serialNumber"], device, request)
        logger.info("enrolment: certificate of %s renewed", device)
        return answer

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,8}", length) or int(length) > MAX_BODY_BYTES:
            raise FleetError(f"a request needs a Content-Length of at most {MAX_BODY_BYTES}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise FleetError("the request is not JSON") from error
        if not isinstance(body, dict):
            raise FleetError("the request is no JSON object")
        return body

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, json.dumps({"error": reason}).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug("enrolment: " + format, *arguments)


def _hang_up(connection: socket) -> None:
    with suppress(OSError):
        connection.shutdown(SHUT_RDWR)


def _server_context(site: Site) -> ssl.SSLContext:
    broker = site.directory / "broker"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL  # who enrols has none yet; a wrong one is refused
    try:
        context.load_cert_chain(broker / "broker.pem", broker / "broker.key")
        context.load_verify_locations(site.directory / "ca.pem")
    except OSError as error:
        raise FleetError(f"{broker}: its certificate cannot be used ({error}); restore it from your backup") from error
    return context


def _texts(body: dict[str, Any], *names: str) -> list[str]:
    values = [body.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise FleetError(f"the request needs {name} as text")
    return values  # type: ignore[return-value]
