"""The broker: a managed mosquitto where it is installed, else amqtt inside this process; or an external one by URL.

mosquitto keeps its sessions on disk, because it has acknowledged messages that ingest may not have stored yet. amqtt
is for a first look: it sends retained messages twice and forgets sessions at exit.
"""

import asyncio
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from device.contract.messages import MAX_PAYLOAD_BYTES
from host.errors import MonitorError

KINDS = ("auto", "amqtt", "mosquitto")
DEFAULT_PORT = 1883
TLS_PORT = 8883
START_TIMEOUT_S = 10


class PortTakenError(MonitorError, OSError):
    """Another program listens on the port."""

    def __init__(self, what: str, hostname: str, port: int) -> None:
        super().__init__(
            f"{what}: {hostname}:{port} cannot be used, another program has it or it is not ours; "
            "stop that program, or choose another port (0 for any free one)"
        )
        self.hostname = hostname
        self.port = port


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerAddress:
    """Where a broker listens and who we are there; `tls` is for `mqtts`, with our certificate where there is one."""

    hostname: str
    port: int = DEFAULT_PORT
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{self.hostname}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningBroker:
    """A broker in use; `failure` says why one of ours no longer runs, or None."""

    address: BrokerAddress
    kind: str  # mosquitto | amqtt | external
    failure: Callable[[], str | None] = lambda: None

    @property
    def hostname(self) -> str:
        return self.address.hostname

    @property
    def port(self) -> int:
        return self.address.port


def parse_broker_url(url: str, *, password_file: Path | None = None) -> BrokerAddress:
    """Read `mqtt[s]://[user@]host[:port]`; a password comes from the first line of a file, never from the URL.

    With `mqtts`, the broker must have a certificate that this machine trusts.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("mqtt", "mqtts") or parts.path.strip("/") or parts.query or parts.fragment:
        raise MonitorError(f"broker {url.rpartition('@')[2]!r}: expected mqtt://[user@]host[:port] or mqtts://…")
    if parts.password is not None:
        raise MonitorError(f"broker {parts.hostname}: a password in a URL can be read by others; put it in a file")
    try:
        port = (DEFAULT_PORT if parts.scheme == "mqtt" else TLS_PORT) if parts.port is None else parts.port
    except ValueError as error:
        raise MonitorError(f"broker {url.rpartition('@')[2]!r}: {error}") from error
    if not parts.hostname or port == 0:
        raise MonitorError(f"broker {url}: name a host, and a port of 1..65535, as in mqtt://broker.local:1883")
    return BrokerAddress(
        hostname=parts.hostname,
        port=port,
        username=parts.username,
        password=_read_password(password_file),
        tls=ssl.create_default_context() if parts.scheme == "mqtts" else None,
    )


def site_broker(directory: Path, role: str) -> BrokerAddress:
    """The broker of a site that `fieldvit fleet init` made, as its `monitor` or `operator`.

    Raises:
        FleetError: there is no such site.
        MonitorError: its certificates cannot be used.
    """
    from host.fleet.site import Site  # a monitor without sites needs no authority

    settings = Site(directory).settings
    identity = directory / "identities" / f"{role}.pem"
    try:
        context = ssl.create_default_context(cafile=directory / "ca.pem")
        context.load_cert_chain(identity)
    except OSError as error:  # an SSLError is one
        raise MonitorError(f"{identity}: cannot be used ({error}); restore it from your backup") from error
    return BrokerAddress(hostname=settings.broker_hostname, port=settings.broker_port, tls=context)


def check_broker_choice(choice: str) -> None:
    """Refuse what is neither a kind of broker nor a URL, before anything is started."""
    if "://" in choice:
        if parse_broker_url(choice).tls is not None:
            raise MonitorError(f"broker {choice!r}: the board made here has no certificate; give mqtt://HOST:PORT")
    elif choice not in KINDS:
        raise MonitorError(f"broker kind {choice!r} is unknown; kinds are {', '.join(KINDS)}, or give mqtt://HOST:PORT")


def bind_port(what: str, hostname: str, port: int) -> socket.socket:
    """Bind a TCP socket (port 0: any free one); PortTakenError names `what` wanted it."""
    try:
        family = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise MonitorError(f"{what}: {hostname!r} is no address of this machine ({error})") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((hostname, port))
    except OSError as error:
        bound.close()
        raise PortTakenError(what, hostname, port) from error
    return bound


@contextmanager
def start_broker(
    kind: str = "auto", hostname: str = "127.0.0.1", port: int = 0, *, directory: Path | None = None
) -> Iterator[RunningBroker]:
    """Run a broker until the block ends.

    Args:
        kind: "mosquitto", "amqtt", or "auto": mosquitto where it is installed.
        hostname: the address to listen on. Anyone who reaches it may connect, so loopback unless you know better.
        port: 0 for any free one.
        directory: where mosquitto keeps sessions and retained messages over a restart; None: nowhere.

    Raises:
        PortTakenError: the port is in use.
        MonitorError: the broker is not installed or did not start; the message ends with what it said.
    """
    if kind not in KINDS:
        raise MonitorError(f"broker kind {kind!r} is unknown; kinds are {', '.join(KINDS)}")
    mosquitto = find_mosquitto()
    if kind == "mosquitto" and mosquitto is None:
        raise MonitorError("mosquitto is not installed; install it (apt install mosquitto) or use the amqtt broker")
    with closing(bind_port("broker", hostname, port)) as probe:
        port = probe.getsockname()[1]
    if mosquitto and kind != "amqtt":
        with _mosquitto(mosquitto, hostname, port, directory) as running:
            yield running
    else:
        with _amqtt(hostname, port) as running:
            yield running


def find_mosquitto() -> str | None:
    """The mosquitto program, also where Debian puts it outside a user's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


@contextmanager
def _mosquitto(program: str, hostname: str, port: int, directory: Path | None) -> Iterator[RunningBroker]:
    with tempfile.TemporaryDirectory(prefix="fieldvit-broker-") as scratch:
        config, log = Path(scratch, "mosquitto.conf"), Path(scratch, "mosquitto.log")
        config.write_text(_mosquitto_config(hostname, port, directory))
        with log.open("wb") as output:
            process = subprocess.Popen([program, "-c", config], stdout=output, stderr=subprocess.STDOUT)

        def failure() -> str | None:
            if process.poll() is None:
                return None
            said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("Error")]
            return f"mosquitto ended with exit code {process.returncode}{''.join(f': {line}' for line in said[-1:])}"

        try:
            _wait_until_listening(hostname, port, failure)
            yield RunningBroker(address=BrokerAddress(hostname=hostname, port=port), kind="mosquitto", failure=failure)
        finally:
            process.terminate()
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _mosquitto_config(hostname: str, port: int, directory: Path | None) -> str:
    lines = [
        f"listener {port} {hostname}",
        "allow_anonymous true",
        "log_dest stderr",
        "log_type error",
        "log_timestamp false",
        f"message_size_limit {2 * MAX_PAYLOAD_BYTES}",  # beyond the contract's limit, so that ingest can tell of it
        "max_queued_messages 100000",
        "persistence false",
    ]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        lines[-1:] = ["persistence true", f"persistence_location {directory.resolve()}/", "autosave_interval 10"]
        lines.append(f"user {directory.owner()}")  # started by root, it would drop to a user who may not write there
    return "\n".join(lines) + "\n"


def _wait_until_listening(hostname: str, port: int, failure: Callable[[], str | None]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if reason := failure():
            raise MonitorError(f"broker on {hostname}:{port} did not start: {reason}")
        try:
            socket.create_connection((hostname, port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise MonitorError(f"broker on {hostname}:{port} did not listen within {START_TIMEOUT_S} s; try again")


@contextmanager
def _amqtt(hostname: str, port: int) -> Iterator[RunningBroker]:
    from amqtt.broker import Broker  # takes 0.7 s to import, and mosquitto users need none of it

    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"{hostname}:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="amqtt", daemon=True)
    thread.start()
    writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()

    class TidyBroker(Broker):  # type: ignore[misc]  # amqtt leaves connections open that broke off
        async def stream_connected(
            self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
        ) -> None:
            writers.add(writer)
            await super().stream_connected(reader, writer, listener_name)

    async def start() -> Broker:
        broker = TidyBroker(config)  # must be made inside its loop
        await broker.start()
        return broker

    try:
        try:
            broker = asyncio.run_coroutine_threadsafe(start(), loop).result(START_TIMEOUT_S)
        except Exception as error:  # amqtt wraps what went wrong in several classes of its own
            raise MonitorError(f"broker on {hostname}:{port} did not start: {error or type(error).__name__}") from error
        try:
            yield RunningBroker(address=BrokerAddress(hostname=hostname, port=port), kind="amqtt")
        finally:
            asyncio.run_coroutine_threadsafe(broker.shutdown(), loop).result(2)
    finally:
        asyncio.run_coroutine_threadsafe(_end_connections(writers), loop).result(2)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=2)
        loop.close()


async def _end_connections(writers: Iterable[asyncio.StreamWriter]) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for writer in list(writers):
        writer.close()
    await asyncio.sleep(0.01)  # transports close in the next turns of the loop


def _read_password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MonitorError(f"password file {path}: cannot be read ({error})") from error
    if not lines or not lines[0]:
        raise MonitorError(f"password file {path}: its first line is empty; write the broker's password there")
    return lines[0]
