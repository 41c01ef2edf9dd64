"""Files over HTTP come whole or with a reason, whatever the server does."""

import contextlib
import http.server
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from device.contract.errors import ConfigError
from device.fetch import CutOffError, FetchError, MissingError, RangeError
from device.web import WebFetch
from tests.support.web import Site, serve

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "file").write_bytes(CONTENT)
    with serve(tmp_path) as site:
        yield site


def read(site: Site, path: str = "targets/file", start: int = 0, end: int | None = None) -> bytes:
    fetch = WebFetch(site.url)
    fetch.silence_s, fetch.slow_window_s = 0.5, 0.4
    try:
        return b"".join(fetch.read(path, start, end))
    finally:
        fetch.close()


@pytest.mark.parametrize(("start", "end"), [(0, None), (7, None), (0, 10), (100, 70000), (len(CONTENT) - 1, None)])
def test_any_range_comes_as_it_is(site: Site, start: int, end: int | None):
    assert read(site, start=start, end=end) == CONTENT[start:end]


def test_one_connection_serves_many_requests_and_is_opened_again_when_closed(site: Site):
    fetch = WebFetch(site.url)
    for _ in range(3):
        assert b"".join(fetch.read("targets/file")) == CONTENT
    assert site.connections == 1
    fetch._connection.sock.shutdown(socket.SHUT_RDWR)  # as a server does after a while
    assert b"".join(fetch.read("targets/file")) == CONTENT
    next(fetch.read("targets/file"))  # a reader that has enough
    assert b"".join(fetch.read("targets/file", 5)) == CONTENT[5:]
    fetch.close()


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        ({"status": 404}, MissingError, "unreachable"),
        ({"status": 403}, MissingError, "unreachable"),
        ({"status": 500}, CutOffError, "unreachable"),
        ({"cut_after": 1000}, CutOffError, "unreachable"),
        ({"drip_s": 0.05}, FetchError, "slow"),
        ({"drip_s": 9}, FetchError, "slow"),
        ({"drip_headers": True}, FetchError, "slow"),
    ],
)
def test_a_bad_server_is_given_up_with_a_reason(site: Site, fault: dict[str, object], kind: type, reason: str):
    for name, value in fault.items():
        setattr(site, name, value)
    started = time.monotonic()
    with pytest.raises(kind) as failed:
        read(site)
    assert (type(failed.value), failed.value.reason) == (kind, reason)
    assert time.monotonic() - started < 3


def test_ranges_that_are_not_given_are_said(site: Site):
    with pytest.raises(RangeError):
        read(site, start=len(CONTENT))
    site.has_ranges = False
    with pytest.raises(RangeError):
        read(site, start=5)
    assert read(site) == CONTENT


def test_nobody_there_is_unreachable(site: Site):
    with pytest.raises(CutOffError, match=r"targets/file: .*refused"):
        b"".join(WebFetch("http://127.0.0.1:1").read("targets/file"))


def test_redirects_are_followed_to_the_same_scheme_only(site: Site, tmp_path: Path):
    with serve(tmp_path) as other:
        site.redirect_to = other.url
        assert read(site, start=3) == CONTENT[3:]
        assert other.asked("file") == ["bytes=3-"]
        for target, message in [
            ("ftp://x", "not safer"),
            ("file://", "not safer"),
            (site.url, "more than 5 redirects"),
        ]:
            site.redirect_to = target
            with pytest.raises(FetchError, match=message):
                read(site)


def test_the_environment_names_the_proxy(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", site.url.replace("http://", "http://user:secret@"))
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(MissingError):  # our site is no proxy: it looks for a file of that name
        b"".join(WebFetch("http://updates.example").read("targets/file"))
    assert site.requests[-1][0] == "http://updates.example/targets/file"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read(site) == CONTENT


def make_certificate(directory: Path) -> None:
    """A key and a certificate for 127.0.0.1 that is its own authority."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "updates")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    (directory / "ca.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (directory / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.fixture
def tls_url(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "targets").mkdir(exist_ok=True)
    (tmp_path / "targets" / "file").write_bytes(CONTENT)
    make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None: ...  # a client that does not trust us

    server = Server(("127.0.0.1", 0), Quiet)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_https_is_checked_against_the_ca(tls_url: str, tmp_path: Path):
    trusting = WebFetch(tls_url, ca_file=tmp_path / "ca.pem")
    assert b"".join(trusting.read("targets/file")) == CONTENT
    trusting.close()
    with pytest.raises(FetchError, match=r"self-signed certificate; see update\.ca_file"):
        b"".join(WebFetch(tls_url).read("targets/file"))
    (tmp_path / "bad.pem").write_text("no certificate")
    for name in ("bad.pem", "missing.pem"):
        with pytest.raises(ConfigError, match=name):
            WebFetch(tls_url, ca_file=tmp_path / name)


def test_a_redirect_may_lead_to_https_and_not_back(site: Site, tls_url: str, tmp_path: Path):
    site.redirect_to = tls_url
    fetch = WebFetch(site.url, ca_file=tmp_path / "ca.pem")
    assert b"".join(fetch.read("targets/file")) == CONTENT
    fetch.close()
    with pytest.raises(FetchError, match=r"see update\.ca_file"):
        read(site)


@pytest.fixture
def tunnel() -> Iterator[tuple[str, list[str]]]:
    """A proxy that knows CONNECT, and the heads of the requests that it got."""
    heads: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as client:
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1)
            heads.append(head.decode())
            host, port = head.split()[1].decode().rsplit(":", 1)
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pump, args=(server, client), daemon=True)
                back.start()
                pump(client, server)
                back.join(timeout=5)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}", heads
    listener.close()
    thread.join(timeout=5)


def test_https_goes_through_a_tunnel(
    tls_url: str, tmp_path: Path, tunnel: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
):
    address, heads = tunnel
    monkeypatch.setenv("https_proxy", f"http://user:secret@{address}")
    monkeypatch.delenv("no_proxy", raising=False)
    fetch = WebFetch(tls_url, ca_file=tmp_path / "ca.pem")
    assert b"".join(fetch.read("targets/file")) == CONTENT
    fetch.close()
    assert heads[0].startswith(f"CONNECT {tls_url.removeprefix('https://')} HTTP/1.")
    assert "Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=" in heads[0]
