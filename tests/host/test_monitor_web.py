"""The page's server and the whole monitor, over real HTTP and MQTT."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from device.contract.messages import Event, ModelState, State, Telemetry
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.monitor.app import MonitorConfig, Ready, run_monitor
from host.monitor.broker import bind_port
from host.monitor.hub import Hub
from host.monitor.store import Store, open_store
from host.monitor.web import create_app, serve_page

ROOT = Path(__file__).parents[2]
CAMERA = DeviceId("greenhouse", "cam-1")
SCRIPT = "<script>alert(1)</script>"
NOW = 5000.0


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = open_store(tmp_path / "monitor.sqlite")
    model = ModelState(name=SCRIPT, version="1.0.0", release=1, precision="int8", backbone="ab")
    state = State(status="online", boot="b1", model=model, labels=(SCRIPT, "\ud800"), learned_version=1)
    opened.record_state(CAMERA, state, received=NOW - 9)
    values = {
        "latency/p50": 0.02,
        "latency/p99": 0.04,
        "drift": 0.1,
        "class/0": 3.0,
        "class/7": 1.0,
        "learned/version": 2.0,
    }
    opened.record_telemetry(CAMERA, Telemetry(boot="b1", sequence=2, time=NOW - 5, values=values), received=NOW - 5)
    event = Event(kind="refused", boot="b1", sequence=3, time=NOW - 4, data={"reason": SCRIPT})
    opened.record_event(CAMERA, event, received=NOW - 4)
    opened.quarantine("x/y", SCRIPT.encode() + b"\xff", "not JSON", received=NOW)
    yield opened
    opened.close()


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def url(store, hub) -> Iterator[str]:
    with serve_page(create_app(store, hub, clock=lambda: NOW), hub) as url:
        yield url


def get(url: str, **headers: str) -> tuple[int, Message, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def get_json(url: str) -> Any:
    return json.loads(get(url)[2])


def test_fleet_and_device_as_json(url):
    fleet = get_json(url + "api/devices")
    assert (fleet["connected"], fleet["quarantined"]) == (True, 1)
    (summary,) = fleet["devices"]
    assert (summary["status"], summary["learned_version"], summary["latest"]["drift"]) == ("online", 2, 0.1)
    device = get_json(url + "api/devices/greenhouse/cam-1")
    assert device["labels"] == [SCRIPT, "\ud800"]
    assert device["events"][0]["data"] == {"reason": SCRIPT}
    assert device["gaps"][0]["first"] == 1
    series = get_json(url + "api/devices/greenhouse/cam-1/series?seconds=60")
    assert (series["times"], series["values"]["latency/p99"]) == ([NOW - 5], [0.04])
    assert series["classes"] == [{"label": SCRIPT, "count": 3.0}, {"label": "class 7", "count": 1.0}]
    assert get_json(url + "api/quarantine")["quarantine"][0]["payload"] == SCRIPT + "\\xff"


@pytest.mark.parametrize(
    "path", ["api/devices/greenhouse/none", "api/devices/a%20b/c", "api/devices/a/b/series", "device/a/b"]
)
def test_unknown_devices_are_404(url, path):
    assert get(url + path)[0] == 404


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "99999999999", "1e3", "٣"])
def test_a_bad_range_is_400(url, seconds):
    path = "api/devices/greenhouse/cam-1/series?seconds=" + urllib.request.quote(seconds)
    assert get(url + path)[0] == 400


@pytest.mark.parametrize("path", ["", "device/greenhouse/cam-1", "api/devices", "static/ui.js", "healthz", "nowhere"])
def test_every_answer_is_guarded(url, path):
    _, headers, body = get(url + path)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    if headers["Content-Type"].startswith("text/html"):
        assert SCRIPT not in body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_other_host_names_are_refused(url, host):
    assert get(url + "api/devices", Host=host)[0] == 421


def test_only_reading_is_possible(url):
    for method in ("POST", "PUT", "DELETE"):
        with pytest.raises(urllib.error.HTTPError, match="405") as error:
            urllib.request.urlopen(urllib.request.Request(url + "api/devices", data=b"{}", method=method), timeout=5)
        error.value.close()


def test_silence_is_not_shown_as_online(store, hub):
    app = create_app(store, hub, clock=lambda: NOW + 600, is_connected=lambda: False)
    with serve_page(app, hub) as url:
        assert get_json(url + "api/devices")["devices"][0]["status"] == "silent"
        assert get(url + "healthz")[0] == 503


def test_metrics_are_prometheus_text(url):
    status, headers, text = get(url + "metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'fieldvit_devices{status="online"} 1' in text
    assert 'fieldvit_device_latency_p99_seconds{site="greenhouse",device="cam-1"} 0.040000000000000001' in text
    assert "fieldvit_messages_quarantined_total 1" in text


def test_a_change_reaches_an_open_page_and_stopping_ends_the_stream(store, hub):
    lines: list[str] = []
    with serve_page(create_app(store, hub), hub) as url:
        stream = urllib.request.urlopen(url + "events", timeout=5)
        reader = threading.Thread(target=lambda: lines.extend(line.decode().strip() for line in stream), daemon=True)
        reader.start()
        hub.notify(CAMERA)
        hub.notify(CAMERA)
        time.sleep(0.6)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    reader.join(timeout=2)
    stream.close()
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert {"connected": True, "devices": ["greenhouse/cam-1"]} in data
    assert len(data) <= 3  # hello, then the two changes merged


def test_static_files_are_all_there(url):
    for name in ("fleet.js", "device.js", "ui.js", "charts.js", "events.js", "monitor.css", "icon.svg"):
        assert get(url + "static/" + name)[0] == 200
    assert get(url + "static/vendor/uPlot.iife.min.js")[0] == 200
    assert get(url + "static/../web.py")[0] == 404


def test_the_monitor_runs_and_stops_cleanly(tmp_path):
    ready_file = tmp_path / "ready.json"
    script = (
        "import sys; from pathlib import Path; from host.monitor.app import *; p = Path(sys.argv[1]);"
        "run_monitor(MonitorConfig(store=p / 's.sqlite', broker_port=0, http_port=0, ready_file=p / 'ready.json'));"
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, env=environment, text=True
    )
    deadline = time.monotonic() + 20
    while not ready_file.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ready = json.loads(ready_file.read_text())
    assert get(ready["page"] + "healthz")[:1] == (200,)
    assert get_json(ready["page"] + "api/devices")["devices"] == []
    with urllib.request.urlopen(ready["page"] + "events", timeout=5):  # an open page must not hold it up
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert time.monotonic() - started < 3
    assert not ready_file.exists()
    assert {"torch", "tensorflow"}.isdisjoint(output.split())


def test_taken_ports_and_bad_settings_are_clear_errors(tmp_path):
    with bind_port("other", "127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        store = tmp_path / "s.sqlite"
        for ports, name in (
            ({"broker_port": port, "http_port": 0}, "broker"),
            ({"broker_port": 0, "http_port": port}, "page"),
        ):
            with pytest.raises(MonitorError, match=rf"{name}: 127.0.0.1:{port} cannot be used"):
                run_monitor(MonitorConfig(store=store, **ports))
    with pytest.raises(MonitorError, match="kinds are auto, amqtt, mosquitto"):
        MonitorConfig(store=store, broker_kind="rabbit")
    with pytest.raises(MonitorError, match=r"page: port must be 0\.\.65535"):
        MonitorConfig(store=store, http_port=70000)


def test_the_monitor_can_be_stopped_by_its_caller(store_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ready: list[Ready] = []
    stop = threading.Event()

    def on_ready(where: Ready) -> None:
        ready.append(where)
        stop.set()

    config = MonitorConfig(store=store_name, broker_port=0, http_port=0, broker_kind="amqtt")
    run_monitor(config, stop=stop, on_ready=on_ready)
    assert ready[0].broker_kind == "amqtt"
    assert ready[0].page.startswith("http://127.0.0.1:")
