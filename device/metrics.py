"""Figures for Prometheus: `GET /metrics` in the text exposition format, version 0.0.4, from a thread of its own.

Only what telemetry says anyway, on loopback unless the configuration says otherwise. It reads the agent's status when it
is asked, one request at a time, and a client that is slow loses its connection, never the agent its time.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from device.config import MetricsConfig
from device.contract.errors import ConfigError

CLIENT_TIMEOUT_S = 5.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "fieldvit_device"

log = logging.getLogger(__name__)


class MetricsServer:
    """Serves the figures of one agent. The port is bound at once, so that a taken one is said at the start."""

    def __init__(self, config: MetricsConfig, status: Callable[[], Mapping[str, Any]]) -> None:
        """Bind.

        Raises:
            ConfigError: the address cannot be bound.
        """

        class Handler(_Handler):
            read_status = staticmethod(status)

        try:
            self._server = HTTPServer((config.address, config.port), Handler)
        except OSError as error:
            raise ConfigError(
                f"metrics: {config.address}:{config.port} cannot be used ({error.strerror}); choose another metrics.port"
            ) from error
        self.thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    read_status: Callable[[], Mapping[str, Any]]
    timeout = CLIENT_TIMEOUT_S
    server_version = "fieldvit-device"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        content = render(self.read_status()).encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)


def render(status: Mapping[str, Any]) -> str:
    """The exposition text of an agent's status (`Agent.status`)."""
    window: Mapping[str, float] = status.get("window") or {}
    lines: list[str] = []

    def add(name: str, kind: str, text: str, samples: Mapping[str, float | int | None]) -> None:
        given = [f"{PREFIX}_{name}{labels} {value:g}" for labels, value in samples.items() if value is not None]
        if given:
            lines.extend([f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} {kind}", *given])

    model = _labels(**{name: status.get(name) or "" for name in ("name", "version", "precision", "slot", "state")})
    add("model_info", "gauge", "The model that is served.", {model: 1})
    add("learned_version", "gauge", "Lessons committed on this board.", {"": status.get("learned_version")})
    add("frames_total", "counter", "Frames classified since the start.", {"": status.get("frames")})
    add("errors_total", "counter", "Frames and steps that failed since the start.", {"": status.get("errors")})
    bad = {_labels(reason=reason): count for reason, count in (status.get("bad_frames") or {}).items()}
    add("bad_frames_total", "counter", "Frames that could not be used, and failures of their source.", bad)
    add("frames_dropped_total", "counter", "Frames that gave way to newer ones.", {"": status.get("frames_dropped")})
    add("spool_messages", "gauge", "Messages that wait for the broker.", {"": status.get("spool_depth")})
    add("spool_dropped_total", "counter", "Messages dropped, ever.", {"": status.get("spool_dropped")})
    add("connected", "gauge", "Whether the broker is connected.", {"": int(bool(status.get("connected")))})
    add("problem", "gauge", "Whether golden frames are computed otherwise.", {"": int(bool(status.get("problem")))})
    fallbacks = status.get("delegate_fallbacks")
    add("delegate_fallbacks_total", "counter", "Models that the processor had to take over.", {"": fallbacks})
    quantiles = {f'{{quantile="0.{p}"}}': window.get(f"latency/p{p}") for p in (50, 90, 99)}
    add("latency_seconds", "gauge", "Of the frames of the last window.", quantiles)
    add("throughput_fps", "gauge", "Frames a second in the last window.", {"": window.get("throughput")})
    add("drift", "gauge", "Shift of the features in standard deviations.", {"": window.get("drift")})
    add("memory_bytes", "gauge", "Resident memory of the agent.", {"": window.get("memory")})
    add("temperature_celsius", "gauge", "The hottest thermal zone.", {"": window.get("temperature")})
    return "\n".join(lines) + "\n"


def _labels(**labels: object) -> str:
    escaped = {
        name: str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
