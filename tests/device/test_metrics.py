"""Figures for Prometheus: on loopback unless meant otherwise, well formed, and never in the agent's way."""

import json
import re
import urllib.request
from urllib.error import HTTPError, URLError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.config import MetricsConfig
from device.contract.errors import ConfigError
from device.metrics import MetricsServer, render
from tests.support.agent import Field, wait_for
from tests.support.broker import find_free_port
from tests.support.tiny_bundle import write_frames

SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="(\\.|[^"\\\n])*"(,[a-z]+="(\\.|[^"\\\n])*")*\})? -?[\d.e+-]+')


def read(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return answer.read().decode()


def try_read(port: int) -> str:
    try:
        return read(port)
    except URLError:  # not yet
        return ""


def test_a_running_agent_gives_figures(field: Field):
    port = find_free_port()
    with (field.root / "agent.toml").open("a") as config:
        config.write(f"\n[metrics]\nport = {port}\n")
    write_frames(field.root / "frames", 5, 1)
    field.cli("update")
    with field.agent():
        wait_for(lambda: "fieldvit_device_frames_total 5" in try_read(port))
        wait_for(lambda: 'latency_seconds{quantile="0.50"}' in read(port))
        text = read(port)
    model = r'model_info\{name="tiny",version="1.0.0",precision="\w+",slot="a",state="confirmed"\} 1'
    assert re.search(model, text)
    assert "fieldvit_device_problem 0" in text
    require_format(text)


def require_format(text: str) -> None:
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or SAMPLE.fullmatch(line), line


@given(
    st.dictionaries(st.sampled_from(["name", "version", "slot"]), st.text()),
    st.dictionaries(
        st.sampled_from(["latency/p50", "drift", "memory"]), st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_any_status_is_well_formed(labels: dict[str, str], window: dict[str, float]):
    text = render(labels | {"window": window})
    for line in text.split("\n")[:-1]:  # not splitlines: a label may hold other line ends than the format's
        assert line.startswith("# ") or SAMPLE.fullmatch(line), line


def test_only_metrics_are_there_and_a_taken_port_is_said():
    port = find_free_port()
    server = MetricsServer(MetricsConfig(port=port), lambda: {"frames": 3})
    server.start()
    try:
        assert "frames_total 3" in read(port, "/metrics?x=1")
        with pytest.raises(HTTPError, match="404"):
            read(port, "/../agent.toml")
        with pytest.raises(ConfigError, match=f"metrics: 127.0.0.1:{port} cannot be used"):
            MetricsServer(MetricsConfig(port=port), dict)
    finally:
        server.stop()


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.5", "::", "board.local", ""])
def test_other_machines_only_when_it_is_said(address: str):
    with pytest.raises(ConfigError, match=r"metrics\.address"):
        MetricsConfig(port=9477, address=address)


def test_loopback_and_what_is_meant():
    assert MetricsConfig(port=9477, address="::1").allow_remote is False
    assert MetricsConfig(port=9477, address="0.0.0.0", allow_remote=True).port == 9477
    with pytest.raises(ConfigError, match=r"metrics\.port must be 1\.\.65535, got 0"):
        MetricsConfig(port=0)


def test_status_holds_the_window(field: Field):
    field.cli("update")
    with field.agent():
        wait_for(lambda: "throughput" in json.loads(field.cli("status", "--json").stdout).get("window", {}))
