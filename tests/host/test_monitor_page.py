"""Both pages in a real browser: what a person sees, live, on a desk and on a phone."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from device.contract.messages import Event, ModelState, State, Telemetry, encode_event, encode_state, encode_telemetry
from device.contract.topics import DeviceId
from host.monitor.app import MonitorConfig, Ready, run_monitor
from host.monitor.rollout.journal import Entry, Journal
from host.monitor.rollout.plan import Plan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
]
CAMERA = DeviceId("greenhouse", "cam-1")
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
Publish = Callable[[str, bytes], None]


@pytest.fixture(scope="module")
def monitor(tmp_path_factory) -> Iterator[Ready]:
    stop, has_started, ready = threading.Event(), threading.Event(), []
    folder = tmp_path_factory.mktemp("monitor")
    begin_rollout(folder / "rollouts")
    config = MonitorConfig(store=folder / "s.sqlite", broker_port=0, http_port=0, rollouts=folder / "rollouts")

    def on_ready(where: Ready) -> None:
        ready.append(where)
        has_started.set()

    thread = threading.Thread(target=run_monitor, args=(config,), kwargs={"stop": stop, "on_ready": on_ready})
    thread.start()
    assert has_started.wait(20)
    yield ready[0]
    stop.set()
    thread.join(timeout=10)


def begin_rollout(root: Path) -> None:
    """One that goes badly, by what its boards say."""
    now = time.time()
    plan = Plan(id="leaves-2", channel="canary", name="leaves", version="2.0.0", release=2, created=now, only=("x/*",))
    journal = Journal.create(root, plan)
    for number, kind in enumerate(("confirmed", "done", "failed", "reverted")):
        detail = HOSTILE if kind == "failed" else ""
        journal.append(Entry(time=now, kind="asked", device=f"x/cam-{number}", command="c.1", expires=now + 60))
        journal.append(
            Entry(time=now, kind=kind, device=f"x/cam-{number}", reason="health" * bool(detail), detail=detail)
        )
    journal.append(Entry(time=now, kind="paused", reason="3 of 4 boards are done", by="ada"))


@pytest.fixture(scope="module")
def publish(monitor) -> Iterator[Publish]:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect(monitor.broker.hostname, monitor.broker.port)
    client.loop_start()

    def send(kind: str, payload: bytes) -> None:
        client.publish(CAMERA.topic(kind), payload, qos=1).wait_for_publish(timeout=5)

    model = ModelState(name="vit-tiny", version="1.2.0", release=3, precision="int8", backbone="ab" * 20)
    send(
        "state",
        encode_state(State(status="online", boot="b1", board="raspberry-pi-5", model=model, labels=("leaf", HOSTILE))),
    )
    now = time.time()
    for sequence in range(1, 60):
        send("telemetry", telemetry(sequence, 0.020 + sequence / 1e4, now - 600 + 10 * sequence))
    send(
        "event", encode_event(CAMERA, Event(kind="refused", boot="b1", sequence=60, time=now, data={"reason": HOSTILE}))
    )
    yield send
    client.disconnect()
    client.loop_stop()


def telemetry(sequence: int, p50: float, time_s: float) -> bytes:
    values = {
        "latency/p50": p50,
        "latency/p90": p50 * 1.2,
        "latency/p99": p50 * 2,
        "drift": 0.1,
        "class/0": 5.0,
        "class/1": 2.0,
    }
    return encode_telemetry(CAMERA, Telemetry(boot="b1", sequence=sequence, time=time_s, values=values))


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium's sandbox refuses root
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(request, browser, publish) -> Iterator[object]:
    context = browser.new_context(viewport=request.param)
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    yield page
    width = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert troubles == []
    assert width == request.param["width"]  # no horizontal scroll


sequences = iter(range(61, 100))


def test_the_fleet_page_updates_itself(page, monitor, publish):
    page.goto(monitor.page)
    row = page.locator("[data-device='greenhouse/cam-1']")
    row.get_by_text("Online").wait_for()
    assert "vit-tiny" in row.inner_text()
    assert page.locator("#live").inner_text() == "Live"
    sequence = next(sequences)
    publish("telemetry", telemetry(sequence, sequence / 1000 + 0.3, time.time()))
    row.get_by_text(f"{sequence + 300} ms").wait_for(timeout=5000)


def test_the_fleet_page_can_be_searched_and_left_by_keyboard(page, monitor):
    page.goto(monitor.page)
    rows = page.locator("#rows tr")
    rows.first.wait_for()
    page.get_by_role("searchbox", name="Search devices").fill("nothing like it")
    page.get_by_text("No device matches.").wait_for()
    assert rows.count() == 0
    page.get_by_role("searchbox").fill("PI-5 vit")
    page.get_by_role("link", name="greenhouse / cam-1").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="cam-1").wait_for()


def test_the_device_page_updates_itself(page, monitor, publish):
    page.goto(monitor.page + "device/greenhouse/cam-1")
    chart = page.get_by_role("img", name="Latency p50: now")
    chart.wait_for()
    assert page.locator(".chart:visible canvas").count() == 2  # latency and drift: what this device measures
    sequence = next(sequences)
    publish("telemetry", telemetry(sequence, sequence / 1000 + 0.5, time.time()))
    page.get_by_role("img", name=f"now {sequence + 500} ms").wait_for(timeout=5000)


def test_what_devices_say_stays_text(page, monitor):
    page.goto(monitor.page + "device/greenhouse/cam-1")
    page.locator("#events").get_by_text(HOSTILE).wait_for()
    page.locator("#classes").get_by_role("rowheader", name=HOSTILE).wait_for()
    assert page.locator("main img[src=x]").count() == 0
    assert page.title() == "greenhouse/cam-1 · Online · FieldViT"


def test_the_rollouts_page_says_how_far_it_is_and_why(page, monitor):
    page.goto(monitor.page)
    page.get_by_role("link", name="Rollouts").click()
    card = page.locator("[data-rollout='leaves-2']")
    card.get_by_text("1 do well, 1 watched, 1 failed, 1 back").wait_for()
    assert "4 boards told" in card.inner_text()
    card.get_by_text("Aborted").first.wait_for(timeout=8000)  # the engine found that one of four is too many
    assert card.get_by_text(HOSTILE).count() >= 1
    assert page.locator("main img[src=x]").count() == 0
    card.get_by_role("link", name="x/cam-2").first.wait_for()


def test_the_alerts_page_says_what_fires_and_what_was_told(page, monitor):
    page.goto(monitor.page + "rollouts")
    page.get_by_role("link", name="Alerts").click()
    page.get_by_text("Nothing fires.").or_(page.get_by_text("took-a-model-back").first).first.wait_for()
    assert "rules: board-away, took-a-model-back" in page.locator("#rules").inner_text()


def test_a_device_not_heard_of_says_so(browser, monitor):
    page = browser.new_page()
    page.goto(monitor.page + "device/greenhouse/none")
    page.get_by_text("No message of this device").wait_for()
    page.close()
