"""The web page: static files, a JSON API, server-sent events, Prometheus metrics.

The pages are fixed HTML; what devices say reaches the browser only as JSON and is shown as text. A strict
Content-Security-Policy and a check of the Host header (against DNS rebinding) stand behind that.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from device.contract.errors import MessageError
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.alerts.service import AlertService
from host.monitor.broker import bind_port
from host.monitor.hub import Hub
from host.monitor.rollouts_view import rollouts_view
from host.monitor.store import Store
from host.monitor.views import alerts_text, device_view, fleet_view, metrics_text, quarantined_view, series_view

START_TIMEOUT_S = 10
STOP_TIMEOUT_S = 2
MAX_SERIES_S = 31 * 86400
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HERE = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def create_app(
    store: Store,
    hub: Hub,
    *,
    rollouts: Path = Path("rollouts"),
    alerts: AlertService | None = None,
    is_connected: Callable[[], bool] = lambda: True,
    allowed_hosts: tuple[str, ...] = LOOPBACK,
    clock: Callable[[], float] = time.time,
) -> Starlette:
    """Build the application; `allowed_hosts` are the names it answers to, ("*",) for any; `rollouts` is their directory."""
    routes = _Routes(
        store=store, hub=hub, rollouts_root=rollouts, alert_service=alerts, is_connected=is_connected, clock=clock
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        hub.bind(asyncio.get_running_loop())
        yield

    return Starlette(
        routes=[
            Route("/", routes.fleet_page),
            Route("/device/{site}/{device}", routes.device_page),
            Route("/rollouts", routes.rollouts_page),
            Route("/alerts", routes.alerts_page),
            Route("/api/devices", routes.devices),
            Route("/api/devices/{site}/{device}", routes.device),
            Route("/api/devices/{site}/{device}/series", routes.series),
            Route("/api/quarantine", routes.quarantine),
            Route("/api/rollouts", routes.rollouts),
            Route("/api/alerts", routes.alerts),
            Route("/events", routes.events),
            Route("/metrics", routes.metrics),
            Route("/healthz", routes.healthz),
            Mount("/static", StaticFiles(directory=_HERE / "static")),
        ],
        middleware=[Middleware(_Guard, allowed_hosts=allowed_hosts)],
        lifespan=lifespan,
    )


@contextmanager
def serve_page(app: Starlette, hub: Hub, *, hostname: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve `app` in a thread until the block ends; yields its URL. PortTakenError if the port is in use."""
    bound = bind_port("page", hostname, port)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="page", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise MonitorError(f"page: did not start on {hostname}:{port}; its log above says why")
            time.sleep(0.01)
        shown = f"[{hostname}]" if bound.family == socket.AF_INET6 else hostname
        yield f"http://{shown}:{bound.getsockname()[1]}/"
    finally:
        hub.close()
        server.should_exit = True
        thread.join(timeout=STOP_TIMEOUT_S)
        bound.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routes:
    """Store calls are short but blocking: Starlette runs these plain functions in its thread pool."""

    store: Store
    hub: Hub
    rollouts_root: Path
    alert_service: AlertService | None
    is_connected: Callable[[], bool]
    clock: Callable[[], float]

    def fleet_page(self, request: Request) -> Response:
        return _page("fleet.html")

    def device_page(self, request: Request) -> Response:
        device = _device_of(request)
        is_known = device is not None and self.store.device(device) is not None
        return _page("device.html", status_code=200 if is_known else 404)

    def rollouts_page(self, request: Request) -> Response:
        return _page("rollouts.html")

    def rollouts(self, request: Request) -> Response:
        return _json({"now": self.clock(), "rollouts": rollouts_view(self.rollouts_root)})

    def alerts_page(self, request: Request) -> Response:
        return _page("alerts.html")

    def alerts(self, request: Request) -> Response:
        shown = self.alert_service.view() if self.alert_service else {"firing": [], "notices": [], "severities": {}}
        return _json({"now": self.clock(), **shown})

    def devices(self, request: Request) -> Response:
        return _json(fleet_view(self.store, now=self.clock(), is_connected=self.is_connected()))

    def device(self, request: Request) -> Response:
        device = _device_of(request)
        return _json(device and device_view(self.store, device, now=self.clock()))

    def series(self, request: Request) -> Response:
        device = _device_of(request)
        seconds = request.query_params.get("seconds", "3600")
        if not (seconds.isascii() and seconds.isdecimal() and 0 < int(seconds[:9]) <= MAX_SERIES_S):
            return _json({"error": f"seconds must be 1..{MAX_SERIES_S}"}, status_code=400)
        return _json(device and series_view(self.store, device, seconds=int(seconds[:9]), now=self.clock()))

    def quarantine(self, request: Request) -> Response:
        return _json({"quarantine": [quarantined_view(row) for row in self.store.quarantined()]})

    async def events(self, request: Request) -> Response:
        return EventSourceResponse(self.hub.stream(), ping=15)

    def metrics(self, request: Request) -> Response:
        text = metrics_text(self.store, now=self.clock(), is_connected=self.is_connected())
        text += alerts_text(self.alert_service.firing() if self.alert_service else {})
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def healthz(self, request: Request) -> Response:
        if self.is_connected():
            return PlainTextResponse("ok\n")
        return PlainTextResponse("no connection to the broker\n", status_code=503)


def _device_of(request: Request) -> DeviceId | None:
    try:
        return DeviceId(request.path_params["site"], request.path_params["device"])
    except MessageError:
        return None


def _page(name: str, *, status_code: int = 200) -> Response:
    html = (_HERE / "pages" / name).read_text(encoding="utf-8")
    return HTMLResponse(html, status_code=status_code, headers={"Cache-Control": "no-cache"})


def _json(content: Any, *, status_code: int = 200) -> Response:
    if content is None:
        content, status_code = {"error": "no message of this device has arrived here"}, 404
    body = json.dumps(content, separators=(",", ":"), allow_nan=False)  # ASCII: devices may send lone surrogates
    return Response(body, status_code=status_code, media_type="application/json", headers={"Cache-Control": "no-store"})


class _Guard:
    """Refuses requests under another host's name, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, allowed_hosts: tuple[str, ...]) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        is_allowed = "*" in self._allowed_hosts or name in self._allowed_hosts
        app = self._app if is_allowed else PlainTextResponse("this host name is not served here\n", status_code=421)
        await app(scope, receive, send_guarded)
