"""Alerts: what holds, what is told of it, how often, and to whom."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.contract.messages import Event, State
from device.contract.topics import DeviceId
from host.errors import MonitorError
from host.fleet.site import SiteSettings, create_site
from host.monitor.alerts.conditions import Expiry, conditions
from host.monitor.alerts.rules import DEFAULT, AlertConfig, Rule, load_alerts
from host.monitor.alerts.service import AlertService
from host.monitor.alerts.tracker import BEGUN, CALM_S, OVER, Notice, Tracker
from host.monitor.alerts.webhook import cloud_event, post
from host.monitor.app import _certificates
from host.monitor.rows import DeviceRow, EventRow
from host.monitor.store import open_store

NOW = 1_000_000.0
AWAY = Rule(name="away", when="offline", for_s=600)


def row(name: str = "cam-1", status: str = "online", *, age_s: float = 1.0, **latest: float) -> DeviceRow:
    return DeviceRow(
        device=DeviceId("lab", name),
        status=status,
        boot="b",
        state=None,
        first_seen=0.0,
        last_seen=NOW - age_s,
        latest={name.replace("_", "/"): value for name, value in latest.items()},
        latest_time=NOW,
    )


@pytest.mark.parametrize(
    ("rule", "board", "words"),
    [
        (AWAY, row(status="offline", age_s=7300), "offline, last heard 2 h ago"),
        (AWAY, row(age_s=900), "silent, last heard 15 min ago"),
        (AWAY, row(), ""),
        (AWAY, row(status="unknown"), ""),
        (Rule(name="d", when="drift", above=1.0), row(drift=1.5), "drift is 1.5, above 1"),
        (Rule(name="d", when="drift", above=1.0), row(drift=1.0), ""),
        (Rule(name="d", when="drift", above=1.0), row(), ""),
        (Rule(name="l", when="latency", above=0.1), row(latency_p99=0.25), "latency/p99 is 0.25, above 0.1"),
        (Rule(name="l", when="latency", above=0.1), row(status="offline", latency_p99=0.25), ""),
        (Rule(name="a", when="offline", only=("other/*",)), row(status="offline"), ""),
    ],
)
def test_what_holds_for_a_board_is_said_in_words(rule, board, words):
    found = conditions([rule], [board], now=NOW)
    assert found == ({(rule.name, "lab/cam-1"): words} if words else {})


def test_events_and_certificates():
    rules = [
        Rule(name="back", when="event", events=("rolled-back",)),
        Rule(name="certificate", when="certificate", above=14),
    ]
    data = {"reason": "budget", "detail": "too slow"}
    event = EventRow(event=Event(kind="rolled-back", boot="b", sequence=1, time=NOW, data=data), received=NOW)
    other = EventRow(event=Event(kind="learned", boot="b", sequence=2, time=NOW, data={}), received=NOW)
    board = DeviceId("lab", "cam-1")
    expiries = [Expiry(owner="broker", expires=NOW + 86400), Expiry(owner="lab/cam-1", expires=NOW + 90 * 86400)]
    assert conditions(rules, [], [(board, event), (board, other)], expiries, now=NOW) == {
        ("back", "lab/cam-1"): "rolled-back (budget: too slow)",
        ("certificate", "broker"): "certificate ends in 1.0 days",
    }


def tell(tracker: Tracker, held: dict[tuple[str, str], str], now: float) -> list[Notice]:
    notices = tracker.look(held, now=now)
    for notice in notices:
        tracker.told(notice)
    return notices


def kinds(notices: list[Notice]) -> list[tuple[str, tuple[str, ...]]]:
    return [(notice.kind, notice.boards) for notice in notices]


def test_an_alert_waits_is_told_once_again_while_it_lasts_and_when_it_is_over():
    tracker = Tracker(AlertConfig(rule=(AWAY,), repeat_s=3600))
    held = {("away", "lab/a"): "gone"}
    told = [(now, notice.kind, notice.is_repeated) for now in range(0, 9000, 10) for notice in tell(tracker, held, now)]
    assert told == [(600, BEGUN, False), (4200, BEGUN, True), (7800, BEGUN, True)]
    over = [now for now in range(9000, 9200, 10) if kinds(tell(tracker, {}, now)) == [(OVER, ("lab/a",))]]
    assert over == [9000 - 10 + CALM_S]
    assert not tracker.alerts


def test_what_comes_and_goes_does_not_ring_at_each_crossing():
    rule = Rule(name="d", when="drift", above=1.0)
    tracker = Tracker(AlertConfig(rule=(rule,)))
    told = [n for now in range(0, 3000, 20) for n in tell(tracker, {("d", "lab/a"): "x"} if now % 40 else {}, now)]
    assert len(told) == 1


def test_a_thousand_boards_ring_once():
    tracker = Tracker(AlertConfig(rule=(Rule(name="away", when="offline"),), group_s=30))
    boards = [f"lab/cam-{number:04d}" for number in range(1000)]
    told = []
    for now in range(100):  # they go one after the other, ten in a second
        told += tell(tracker, {("away", board): "gone" for board in boards[: 10 * (now + 1)]}, now)
    assert [len(notice.boards) for notice in told] == [10, 300, 300, 300]
    assert told[1].text.startswith("300 boards; lab/cam-0010: gone")
    assert tracker.firing() == {"away": 1000}


def test_what_nobody_heard_is_told_again():
    tracker = Tracker(AlertConfig(rule=(Rule(name="away", when="offline"),)))
    held = {("away", "lab/a"): "gone"}
    assert len(tracker.look(held, now=0)) == len(tracker.look(held, now=5)) == 1
    tracker.told(tracker.look(held, now=9)[0])
    assert tracker.look(held, now=60) == []


@given(st.lists(st.tuples(st.integers(1, 400), st.sets(st.sampled_from("abcd"))), max_size=40), st.integers(0, 39))
def test_a_restart_tells_nothing_twice_and_forgets_nothing(steps, restart):
    config = AlertConfig(rule=(Rule(name="away", when="offline", for_s=100), Rule(name="drift", when="drift")))
    whole, cut = Tracker(config), Tracker(config)
    now = 0
    for number, (pause, boards) in enumerate(steps):
        now += pause
        held = {(rule.name, f"lab/{board}"): "x" for board in boards for rule in config.rule}
        if number == restart:
            state = json.loads(json.dumps(cut.state()))
            cut = Tracker(config)
            cut.restore(state)
        assert tell(whole, held, now) == tell(cut, held, now)


def test_rules_from_a_file(tmp_path: Path):
    path = tmp_path / "alerts.toml"
    path.write_text(load_alerts.__globals__["__doc__"].partition("\n\n")[2].partition("Without a file")[0])
    config = load_alerts(path)
    assert [rule.name for rule in config.rule] == ["board-away", "took-a-model-back"]
    assert config.rule[0].only == ("greenhouse/*",)
    assert load_alerts(None) is DEFAULT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[rule]]\nname = "a"\nwhen = "rain"', "when 'rain' is unknown; one of offline"),
        ('[[rule]]\nname = "a b"\nwhen = "drift"', "a name has letters"),
        ('[[rule]]\nname = "a"\nwhen = "event"', "`events` goes with when = 'event'"),
        ('[[rule]]\nname = "a"\nwhen = "event"\nevents = ["boom"]', "'boom' is no event"),
        ('[[rule]]\nname = "a"\nwhen = "drift"\n[[rule]]\nname = "a"\nwhen = "drift"', "two rules are named a"),
        ('[[rule]]\nname = "a"\nwhen = "drift"\nseverity = "bad"', "severity must be"),
        ('webhook = "ftp://x"', "webhook must begin with"),
        ("rules = 3", "unknown key 'rules'"),
        ("= 3", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named_and_what_is_wrong_with_it(tmp_path: Path, text: str, message: str):
    path = tmp_path / "alerts.toml"
    path.write_text(text)
    with pytest.raises(MonitorError, match=message):
        load_alerts(path)


class Hook:
    """A webhook that answers as it is told."""

    def __init__(self) -> None:
        self.code, self.got = 204, []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(hook.code)
                if hook.code == 307:
                    self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks/secret-path"


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    thread = threading.Thread(target=hook.server.serve_forever)
    thread.start()
    yield hook
    hook.server.shutdown()
    thread.join()
    hook.server.server_close()


NOTICE = Notice(rule=AWAY, kind=BEGUN, boards=tuple(f"lab/{n}" for n in range(150)), text="150 boards; gone", time=NOW)


def test_a_webhook_gets_a_cloud_event_with_a_token(hook: Hook, tmp_path: Path):
    (tmp_path / "token").write_text("s3cret\n")
    post(hook.url, NOTICE, token_file=tmp_path / "token")
    headers, body = hook.got[0]
    event = json.loads(body)
    assert headers["Authorization"] == "Bearer s3cret"
    assert headers["Content-Type"].startswith("application/cloudevents+json")
    assert {name: event[name] for name in ("specversion", "source", "type", "time")} == {
        "specversion": "1.0",
        "source": "fieldvit/monitor",
        "type": "io.fieldvit.alert.firing",
        "time": "1970-01-12T13:46:40Z",
    }
    assert (event["data"]["count"], len(event["data"]["boards"]), event["data"]["severity"]) == (150, 100, "warning")
    assert event["id"] == cloud_event(NOTICE)["id"]


@pytest.mark.parametrize("code", [307, 400, 503])
def test_a_webhook_that_does_not_take_it_is_no_success_and_no_secret_is_told(hook: Hook, tmp_path: Path, code: int):
    (tmp_path / "token").write_text("s3cret\n")
    hook.code = code
    with pytest.raises(MonitorError, match=str(code)) as failed:
        post(hook.url, NOTICE, token_file=tmp_path / "token")
    assert "s3cret" not in str(failed.value)
    assert "secret-path" not in str(failed.value)


def test_a_webhook_that_is_not_there(tmp_path: Path):
    with pytest.raises(MonitorError, match="cannot be reached"):
        post("http://127.0.0.1:1/x", NOTICE)
    with pytest.raises(MonitorError, match="its first line is the token"):
        post("http://127.0.0.1:1/x", NOTICE, token_file=tmp_path / "none")


# the service


class Fleet:
    """A store with boards, and what a webhook got."""

    def __init__(self, directory: Path, hook: Hook, rules: str) -> None:
        self.now, self.hook, self.directory = NOW, hook, directory
        self.store = open_store(directory / "store.db")
        (directory / "alerts.toml").write_text(f'webhook = "{hook.url}"\n{rules}')
        self.service = self.new_service()

    def new_service(self) -> AlertService:
        config = load_alerts(self.directory / "alerts.toml")
        return AlertService(self.store, config, self.directory / "alerts.json", clock=lambda: self.now)

    def go_on(self, seconds: float) -> None:
        for _ in range(int(seconds / 5)):
            self.now += 5
            with contextlib.suppress(MonitorError):
                self.service.step()

    def be_born(self, name: str) -> None:
        self.store.record_state(DeviceId("lab", name), State(status="online", boot="b"), received=self.now)

    def say(self, name: str, kind: str, sequence: int, **data: str) -> None:
        event = Event(kind=kind, boot="b", sequence=sequence, time=0.0, data=data)
        self.store.record_event(DeviceId("lab", name), event, received=self.now)

    @property
    def told(self) -> list[tuple[str, str, int]]:
        events = [json.loads(body) for _, body in self.hook.got]
        return [(e["type"].rpartition(".")[2], e["data"]["rule"], e["data"]["count"]) for e in events]


RULES = (
    '[[rule]]\nname = "away"\nwhen = "offline"\nfor_s = 60\n'
    '[[rule]]\nname = "back"\nwhen = "event"\nevents = ["rolled-back"]\nfor_s = 600\n'
)


@pytest.fixture
def fleet(tmp_path: Path, hook: Hook) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, hook, RULES)
    yield fleet
    fleet.store.close()


def test_a_board_that_falls_silent_and_one_that_takes_a_model_back(fleet: Fleet):
    fleet.be_born("a")
    fleet.be_born("b")
    fleet.go_on(30)
    assert fleet.told == []
    fleet.say("b", "rolled-back", 1, reason="budget")
    fleet.go_on(10)
    assert fleet.told == [("firing", "back", 1)]
    fleet.go_on(400)
    assert fleet.told[1:] == [("firing", "away", 1)] * 2  # b spoke half a minute later
    assert {(row["rule"], row["board"]) for row in fleet.service.view()["firing"]} == {
        ("away", "lab/a"),
        ("away", "lab/b"),
        ("back", "lab/b"),
    }
    assert fleet.service.firing() == {"away": 2, "back": 1}
    fleet.be_born("a")
    fleet.go_on(120)
    assert fleet.told[3:] == [("resolved", "away", 1)]
    fleet.go_on(600)
    assert sorted(fleet.told[4:]) == [("firing", "away", 1), ("resolved", "back", 1)]  # a is silent again


def test_a_restart_tells_nothing_twice(fleet: Fleet):
    fleet.be_born("a")
    fleet.say("a", "rolled-back", 1)
    fleet.go_on(500)
    before = fleet.told
    fleet.service = fleet.new_service()
    fleet.go_on(50)
    assert fleet.told == before != []
    assert [notice["rule"] for notice in fleet.service.view()["notices"]] == ["away", "back"]


def test_a_webhook_that_was_away_hears_of_it_later_and_is_not_pressed(fleet: Fleet):
    fleet.hook.code = 503
    fleet.say("a", "rolled-back", 1)
    fleet.go_on(300)
    assert 3 <= len(fleet.told) <= 8
    fleet.hook.code = 204
    fleet.hook.got.clear()
    fleet.go_on(300)
    assert ("firing", "back", 1) in fleet.told


def test_a_damaged_state_is_said_and_begun_anew(fleet: Fleet, caplog: pytest.LogCaptureFixture):
    fleet.be_born("a")
    fleet.go_on(500)
    (fleet.directory / "alerts.json").write_text("{")
    fleet.service = fleet.new_service()
    assert "what fires is told anew" in caplog.text
    fleet.go_on(100)
    assert fleet.told == [("firing", "away", 1)] * 2


def test_a_site_s_certificates_are_watched(tmp_path: Path):
    site = create_site(tmp_path / "sites" / "lab", SiteSettings(site="lab", broker_hostname="localhost"))
    now = time.time()
    found = {item.owner: item.expires - now for item in _certificates(site.directory)}
    assert {"broker", "@monitor", "@operator"} <= set(found)
    assert all(seconds > 30 * 86400 for seconds in found.values())
    rule = Rule(name="certificate", when="certificate", above=10_000)
    assert len(conditions([rule], [], (), _certificates(site.directory), now=now)) == len(found)
