"""`fieldvit monitor`: broker, ingest, store and page in one process, until it is told to stop."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from host.errors import MonitorError
from host.fleet.commands import Commander
from host.monitor.alerts.conditions import Expiry
from host.monitor.alerts.rules import load_alerts
from host.monitor.alerts.service import AlertService
from host.monitor.broker import (
    DEFAULT_PORT,
    KINDS,
    BrokerAddress,
    RunningBroker,
    parse_broker_url,
    site_broker,
    start_broker,
)
from host.monitor.hub import Hub
from host.monitor.ingest import Ingest
from host.monitor.retention import Retention, forgetting
from host.monitor.rollout.engine import Engine, Order
from host.monitor.store import Store, is_url, open_store
from host.monitor.web import LOOPBACK, create_app, serve_page
from host.signals import stop_on_signals

CHECK_S = 0.5
STOP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """What `run_monitor` needs.

    `store` is a SQLite file or the URL of a PostgreSQL database. `broker` is the URL of an existing broker (its password is the first line of `broker_password_file`), and `site` the
    directory of a site, whose broker is used as its monitor; without either, one of `broker_kind` is started on `broker_hostname`:`broker_port`. Port 0 means any free port.
    """

    store: str | Path
    broker: str | None = None
    broker_password_file: Path | None = None
    site: Path | None = None
    broker_kind: str = "auto"
    broker_hostname: str = "127.0.0.1"
    broker_port: int = DEFAULT_PORT
    http_hostname: str = "127.0.0.1"
    http_port: int = 8080
    ready_file: Path | None = None
    rollouts: Path = Path("rollouts")
    alerts: Path | None = None
    retention: Retention = field(default_factory=Retention)

    def __post_init__(self) -> None:
        if self.broker_kind not in KINDS:
            raise MonitorError(f"broker kind {self.broker_kind!r} is unknown; kinds are {', '.join(KINDS)}")
        for name, port in (("broker", self.broker_port), ("page", self.http_port)):
            if not 0 <= port <= 65535:
                raise MonitorError(f"{name}: port must be 0..65535, got {port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Where everything listens; `broker_kind` is "external" for a broker given by URL."""

    broker: BrokerAddress
    broker_kind: str
    page: str


def run_monitor(
    config: MonitorConfig,
    *,
    stop: threading.Event | None = None,
    on_ready: Callable[[Ready], None] = lambda ready: None,
) -> None:
    """Run until SIGTERM, SIGINT or `stop`; then commit, close and return within 3 seconds.

    Raises:
        MonitorError: a port is taken, the store cannot be used, or the broker we started ended.
        BrokerError: the broker given by URL cannot be reached.
    """
    stop = stop or threading.Event()
    with ExitStack() as stack:
        stack.enter_context(stop_on_signals(stop))
        store = open_store(config.store)
        stack.callback(store.close)
        stack.enter_context(forgetting(lambda pause: store.forget(config.retention, now=time.time(), pause=pause)))
        running = stack.enter_context(_broker(config))
        hub = Hub(is_connected=lambda: ingest.is_connected)
        ingest = Ingest(store, running.address, on_change=hub.notify)
        ingest.start()
        stack.callback(ingest.stop)
        allowed_hosts = LOOPBACK if config.http_hostname in LOOPBACK else ("*",)
        alerts = _alert_service(config, store)
        app = create_app(
            store,
            hub,
            rollouts=config.rollouts,
            alerts=alerts,
            is_connected=lambda: ingest.is_connected,
            allowed_hosts=allowed_hosts,
        )
        page = stack.enter_context(serve_page(app, hub, hostname=config.http_hostname, port=config.http_port))
        engine = Engine(config.rollouts, store, partial(_send, config.site, running.address))
        stack.enter_context(_beside("rollouts", engine.run))
        stack.enter_context(_beside("alerts", alerts.run))
        ready = Ready(broker=running.address, broker_kind=running.kind, page=page)
        stack.enter_context(_ready_file(config.ready_file, ready))
        on_ready(ready)
        while not stop.wait(CHECK_S):
            if reason := running.failure():
                raise MonitorError(f"broker: {reason}; start the monitor again")


@contextmanager
def _broker(config: MonitorConfig) -> Iterator[RunningBroker]:
    if config.site is not None:
        yield RunningBroker(address=site_broker(config.site, "monitor"), kind="external")
        return
    if config.broker is not None:
        yield RunningBroker(
            address=parse_broker_url(config.broker, password_file=config.broker_password_file), kind="external"
        )
        return
    sessions = _path_beside(config.store, "broker")
    with start_broker(config.broker_kind, config.broker_hostname, config.broker_port, directory=sessions) as running:
        yield running


def _path_beside(store: str | Path, name: str) -> Path:
    """Beside a store's file; for a database elsewhere, in the folder where the monitor runs."""
    return Path(f"{'monitor' if is_url(store) else store}-{name}")


def _alert_service(config: MonitorConfig, store: Store) -> AlertService:
    return AlertService(
        store,
        load_alerts(config.alerts),
        _path_beside(config.store, "alerts.json"),
        folder=config.alerts.parent if config.alerts else Path(),
        expiries=partial(_certificates, config.site) if config.site else tuple,
    )


def _certificates(directory: Path) -> list[Expiry]:
    """When those of a site's boards and of its broker end."""
    from host.fleet.site import Site  # a monitor without sites needs no authority

    site = Site(directory)
    newest: dict[str, float] = {"broker": site.broker_certificate.expires.timestamp()}
    for row in site.certificates():
        if row["revoked"] is None:
            newest[row["name"]] = max(row["expires"], newest.get(row["name"], 0.0))
    return [Expiry(owner=name, expires=expires) for name, expires in newest.items()]


@contextmanager
def _beside(name: str, run: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run it in a thread of its own while the block runs."""
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=STOP_S)


def _send(site: Path | None, address: BrokerAddress, orders: Iterable[Order]) -> None:
    """Give commands to the broker; at a site as its operator, for its monitor may not."""
    from host.fleet.site import hold_identity  # a monitor without sites needs no authority

    if site is not None:
        address = site_broker(site, "operator")
    login = {"username": address.username, "password": address.password, "tls": address.tls}
    alone = hold_identity(site, "operator") if site is not None else nullcontext()
    with alone, Commander(address.hostname, address.port, **login) as commander:
        for device, command in orders:
            commander.order(device, command)


@contextmanager
def _ready_file(path: Path | None, ready: Ready) -> Iterator[None]:
    if path is None:
        yield
        return
    broker = {"hostname": ready.broker.hostname, "port": ready.broker.port, "kind": ready.broker_kind}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({"broker": broker, "page": ready.page}) + "\n")
        partial.replace(path)
    except OSError as error:
        raise MonitorError(f"ready file {path}: cannot be written ({error}); choose a folder you may write") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
