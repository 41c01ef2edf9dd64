"""A simulated fleet against a real broker, the monitor's ingest and its store: nothing lost, nothing twice, one reply each."""

import hashlib
import json
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from device.contract.topics import DeviceId
from host.cli import main
from host.fleet.repository import UpdateRepository
from host.monitor.broker import BrokerAddress, bind_port, find_mosquitto, start_broker
from host.simulate.config import SimulationConfig
from host.simulate.faults import STORM_S, parse_fault
from host.simulate.run import run_simulation, summary
from tests.support.broker import mosquitto
from tests.support.bundles import make_manifest, write_plain_bundle
from tests.support.patience import PATIENCE
from tests.support.simulation import QUICK, operating, require_all_stored, simulating, wait_until, watching
from tests.support.site import make_site

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
SITE = "simulated"
BOARD_1 = DeviceId(SITE, "sim-1")
EVERY_FAULT = (
    "loss=0.05",
    "drift=0.3@1",
    "clock-skew=0.2",
    "reboot-storm=0.4@2",
    "spool-overflow=0.2@1",
    "bad-model=0.3:2:selftest",
    "bad-model=0.3:2:probation",
    "bad-model=0.3:2:errors",
)
VERBS = {
    "learn": {"label": "c", "features": [[0.0, 1.0, 0.0, 0.5]]},
    "status": {},
    "diagnostics": {},
    "rebirth": {},
    "snapshot": {},
    "set-sampling": {"max_fps": 120.0},
    "undo": {"lesson": "none"},
    "format": {},
}
UNREADABLE = b'{"verb": "status"'


@pytest.fixture
def broker():
    with start_broker("mosquitto") as running:
        yield running.address


@pytest.fixture
def repository(tmp_path: Path) -> UpdateRepository:
    repository = UpdateRepository.open_or_create(tmp_path / "repo", tmp_path / "keys")
    publish(repository, 1)
    return repository


def publish(repository: UpdateRepository, release: int) -> None:
    path = repository.directory.parent / f"{release}.fieldvit"
    repository.publish(write_plain_bundle(path, make_manifest(release=release, version=f"{release}.0.0")), "stable")


def test_fifty_boards_with_every_fault_lose_nothing_uncounted_and_answer_once(
    tmp_path: Path, broker: BrokerAddress, repository: UpdateRepository
):
    config = SimulationConfig(
        devices=50,
        interval_s=0.3,
        faults=tuple(map(parse_fault, EVERY_FAULT)),
        updates=repository.directory,
        timing=QUICK,
    )
    names = [config.device_name(number) for number in range(1, 51)]
    with (
        watching(broker, tmp_path) as watched,
        operating(broker, SITE) as operator,
        simulating(config, broker) as running,
    ):
        began = time.monotonic()
        wait_until(lambda: len(watched.store.devices()) == 50)
        publish(repository, 2)
        for name in names:
            for verb, arguments in VERBS.items():
                operator.send(name, f"{verb}-{name}", verb, **arguments)
            for _ in range(2):  # the second one is no new command
                operator.send(name, f"update-{name}", "update")
                operator.send_bytes(name, UNREADABLE)
        ids = [
            *(f"{verb}-{{}}" for verb in (*VERBS, "update")),
            f"unreadable-{hashlib.sha256(UNREADABLE).hexdigest()[:32]}",
        ]
        expected = {(name, pattern.format(name)) for name in names for pattern in ids}
        wait_until(lambda: operator.replies.keys() >= expected)
        time.sleep(max(began + 2 + STORM_S + 1 - time.monotonic(), 1))  # storms end, models soak
        report = running.end()
        assert operator.replies.keys() == expected
        assert all(len(set(map(repr, replies))) == 1 for replies in operator.replies.values())
        require_all_stored(watched, report)
        events = Counter(row.event.kind for name in names for row in watched.store.events(DeviceId(SITE, name)))
        duplicates = sum(row.duplicates for row in watched.store.devices())
    totals = report["totals"]
    assert totals["commands"] == totals["replies"] == len(expected)
    assert totals["waiting"] == 0
    assert totals["dropped"]
    assert totals["boots"] > 60
    assert totals["resent"] >= duplicates > 0
    kinds = {"downloaded", "installed", "confirmed", "rolled-back", "refused", "drift", "learned", "error"}
    assert kinds <= events.keys()
    assert summary(report).count("\n") == 0


def test_an_update_is_tested_served_and_taken_back_as_on_a_board(
    tmp_path: Path, broker: BrokerAddress, repository: UpdateRepository
):
    config = SimulationConfig(devices=1, interval_s=0.5, updates=repository.directory, timing=QUICK)
    with (
        watching(broker, tmp_path) as watched,
        operating(broker, SITE) as operator,
        simulating(config, broker) as running,
    ):
        wait_until(lambda: watched.store.device(BOARD_1) is not None)
        assert operator_result(operator, "1", "update") == {"updated": False} | served("a", "confirmed", 1)
        publish(repository, 2)
        preview = operator_result(operator, "2", "update", dry_run=True)
        assert preview["offered"] == {"name": "plain", "version": "2.0.0", "release": 2}
        result = operator_result(operator, "3", "update")
        assert result["updated"]
        assert result.items() >= served("b", "testing", 2).items()
        wait_until(lambda: operator_result(operator, f"s{time.monotonic_ns()}", "status")["state"] == "confirmed")
        assert operator_result(operator, "4", "rollback") == served("a", "confirmed", 1) | {"dropped": []}
        operator.send("sim-1", "5", "update")
        assert "was rejected here before (rolled-back)" in str(operator.reply("sim-1", "5").error)
        wait_until(lambda: watched.store.device(BOARD_1).state.model.release == 1)
        report = running.end()
        require_all_stored(watched, report)
        events = [row.event for row in reversed(watched.store.events(BOARD_1))]
    story = [(event.kind, event.data.get("release"), event.data.get("reason")) for event in events]
    assert story == [
        ("downloaded", None, None),
        ("installed", 2, None),
        ("confirmed", 2, None),
        ("rolled-back", 2, "rolled-back"),
        ("refused", None, "rejected-before"),
    ]


def operator_result(operator: Any, command_id: str, verb: str, **arguments: Any) -> dict[str, Any]:
    operator.send("sim-1", command_id, verb, **arguments)
    reply = operator.reply("sim-1", command_id)
    assert reply.ok, reply.error
    return reply.result


def served(slot: str, state: str, release: int) -> dict[str, Any]:
    facts = {"name": "plain", "version": f"{release}.0.0", "release": release, "precision": "int8"}
    return {"slot": slot, "state": state, **facts}


def test_a_lesson_by_frame_changes_birth_and_can_be_undone(tmp_path: Path, broker: BrokerAddress):
    config = SimulationConfig(devices=1, interval_s=1.0, timing=QUICK)
    with (
        watching(broker, tmp_path) as watched,
        operating(broker, SITE) as operator,
        simulating(config, broker) as running,
    ):
        wait_until(lambda: watched.store.device(BOARD_1) is not None)
        frames: list[str] = []
        operator.client.message_callback_add(
            BOARD_1.topic("result"),
            lambda client, data, message: frames.append(json.loads(message.payload)["frame_id"]),
        )
        operator.client.subscribe(BOARD_1.topic("result"))
        assert operator_result(operator, "r", "set-sampling", results=True)["sampling"]["results"]
        wait_until(lambda: len(frames) > 2)
        learned = operator_result(operator, "l", "learn", label="cat", frame_ids=frames[-2:])
        assert learned == {"label": "cat", "examples": 2, "classes": 11, "version": 1}
        wait_until(lambda: watched.store.device(BOARD_1).state.labels[-1] == "cat")
        operator.send("sim-1", "x", "learn", label="cat", frame_ids=["nobody's"])
        assert "is not among the last frames" in str(operator.reply("sim-1", "x").error)
        assert operator_result(operator, "u", "undo")["lesson"] == "l"
        wait_until(lambda: "cat" not in watched.store.device(BOARD_1).state.labels)
        require_all_stored(watched, running.end())


def test_two_runs_of_one_seed_measure_the_same(tmp_path: Path, broker: BrokerAddress):
    runs = []
    for site in ("first", "second"):
        faults = (parse_fault("drift=0.5"),)
        config = SimulationConfig(devices=3, interval_s=0.3, duration_s=1.1, seed=5, site=site, faults=faults)
        runs.append(windows_of(config, broker, tmp_path / site))
    assert runs[0] == runs[1]
    assert all(len(of_board) == 3 for of_board in runs[0])


def windows_of(config: SimulationConfig, broker: BrokerAddress, directory: Path) -> list[list[dict[str, float]]]:
    """The first three windows of each board, as they are stored."""
    directory.mkdir()
    with watching(broker, directory) as watched:
        totals = run_simulation(config, broker=str(broker))["totals"]
        wait_until(lambda: watched.count() >= totals["acknowledged"])
        return [[measured(body) for body in watched.windows(f"sim-{n}")[:3]] for n in (1, 2, 3)]


def measured(body: str) -> dict[str, float]:
    """What a board measured, without how its spool was just then."""
    return {name: value for name, value in json.loads(body).items() if not name.startswith("spool/")}


def test_a_broker_that_knows_no_mqtt_5_gets_the_older_one(tmp_path: Path):
    config = SimulationConfig(devices=3, interval_s=0.3, duration_s=1.0, timing=QUICK)
    with start_broker("amqtt") as running, watching(running.address, tmp_path) as watched:
        require_all_stored(watched, run_simulation(config, broker=f"mqtt://{running.address}"))


def test_what_nobody_hears_waits_and_stays_counted_so(broker: BrokerAddress):
    config = SimulationConfig(devices=2, interval_s=0.3, duration_s=1.0, timing=QUICK)
    began = time.monotonic()
    totals = run_simulation(config, broker=str(broker))["totals"]
    assert totals["acknowledged"] == 0
    assert totals["waiting"] == totals["numbered"] > 4
    assert time.monotonic() - began < 10 * PATIENCE


def test_boards_log_in_over_tls_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = shutil.which("mosquitto_passwd")
    if program is None:
        pytest.skip("mosquitto_passwd is not installed")
    site = make_site(tmp_path).directory
    passwords, secret = tmp_path / "passwords", tmp_path / "secret"
    secret.write_text("correct horse\n")
    subprocess.run([program, "-c", "-b", passwords, "fleet", "correct horse"], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(site / "ca.pem"))  # what this machine trusts
    files = {"certfile": "broker.pem", "keyfile": "broker.key"}
    extra = [f"{option} {site / 'broker' / name}" for option, name in files.items()]
    with mosquitto(tmp_path, extra="\n".join([*extra, "allow_anonymous false", f"password_file {passwords}"])) as port:
        url = f"mqtts://fleet@localhost:{port}"
        address = BrokerAddress(
            hostname="localhost",
            port=port,
            username="fleet",
            password="correct horse",
            tls=ssl.create_default_context(),
        )
        config = SimulationConfig(
            devices=3, interval_s=0.3, duration_s=1.0, timing=QUICK, faults=(parse_fault("loss=0.2"),)
        )
        with watching(address, tmp_path) as watched:
            require_all_stored(watched, run_simulation(config, broker=url, password_file=secret))
        secret.write_text("wrong\n")
        lines: list[str] = []
        with pytest.raises(ConnectionError, match=r"refused the login .*--broker-password-file") as refused:
            run_simulation(config, broker=url, password_file=secret, tell=lines.append)
        assert "wrong" not in str(refused.value) + "".join(lines)


def test_ctrl_c_ends_two_processes_in_good_order_with_one_report(tmp_path: Path, broker: BrokerAddress):
    path = tmp_path / "report.json"
    options = ["--devices", "4", "--broker", str(broker), "--rate", "0.3", "--processes", "2", "--report", str(path)]
    with watching(broker, tmp_path) as watched:
        command = [sys.executable, "-m", "host.cli", "simulate", *options, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_until(lambda: watched.count() > 8, timeout_s=30)
                process.send_signal(signal.SIGINT)
                said, wrote = process.communicate(timeout=20 * PATIENCE)
            finally:
                process.kill()
        assert process.returncode == 0, wrote
        report = json.loads(path.read_text())
        require_all_stored(watched, report)
        assert list(report["boards"]) == [f"sim-{number}" for number in range(1, 5)]
        assert [row.status for row in watched.store.devices()] == ["offline"] * 4
    assert json.loads(said) == {name: value for name, value in report.items() if name != "boards"}
    assert report["totals"]["waiting"] == 0
    assert report["totals"]["connections"] == report["totals"]["births"] == 4
    assert "Traceback" not in wrote


def test_a_broker_is_started_where_none_is_given(capsys: pytest.CaptureFixture[str]):
    assert main(["simulate", "--devices", "2", "--broker-port", "0", "--rate", "0.3", "--duration", "0.5"]) == 0
    said, wrote = capsys.readouterr()
    assert "0 acknowledged" in said  # nobody subscribes
    assert "see it with: fieldvit monitor --broker mqtt://127.0.0.1:" in wrote


def test_a_mistake_of_ours_ends_it_with_its_cause(broker: BrokerAddress, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a window")

    monkeypatch.setattr("host.simulate.window.Windows.measure", fail)
    with pytest.raises(ZeroDivisionError, match="a window"):
        run_simulation(SimulationConfig(devices=2, interval_s=0.2, duration_s=5.0, timing=QUICK), broker=str(broker))


def wrong(*words: str, says: str) -> Any:
    return pytest.param(words, says, id=words[-1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        wrong("--devices", "0", says="--devices must be 1..100000, got 0"),
        wrong("--devices", "x", says="Invalid value for '--devices'"),
        wrong("--devices", "2", "--faults", "rain=1", says="fault 'rain' is unknown; faults are loss"),
        wrong("--devices", "2", "--broker", "http://x", says="expected mqtt://[user@]host[:port]"),
        wrong("--devices", "2", "--broker", "mqtt://u:secret@x", says="a password in a URL can be read by others"),
        wrong("--devices", "2", "--broker-password-file", "none", says="is for a broker given by URL; name it"),
        wrong("--devices", "2", "--updates", "none", says="none: refused (unreachable)"),
        wrong("--devices", "2", "--board", "toaster", says="board 'toaster' is unknown; choose one of"),
        wrong("--devices", "2", "--report", "none/report.json", says="none is no directory; make it first"),
        wrong("--devices", "99999", says="99999 boards in one process need 100063 open files"),
    ],
)
def test_wrong_arguments_are_one_clear_line_each(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *words, "--broker-port", "0"]) != 0
    said, wrote = capsys.readouterr()
    assert says in wrote
    assert (said, wrote.count("\n")) == ("", 1)
    assert "secret" not in wrote


def test_a_broker_that_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]):
    with bind_port("test", "127.0.0.1", 0) as nobody:
        port = nobody.getsockname()[1]
        assert main(["simulate", "--devices", "1", "--broker", f"127.0.0.1:{port}"]) == 8
    assert f"error: broker 127.0.0.1:{port}: cannot be reached" in capsys.readouterr().err


@pytest.mark.slow
def test_a_thousand_boards_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = SimulationConfig(devices=1000, interval_s=5.0, duration_s=60.0, faults=(parse_fault("loss=0.001"),))
    with start_broker("mosquitto") as running, watching(running.address, tmp_path) as watched:
        report = run_simulation(config, broker=str(running.address))
        require_all_stored(watched, report, timeout_s=120)
    assert report["totals"]["dropped"] == report["totals"]["waiting"] == 0
    assert report["totals"]["acknowledged"] > 10_000
    with capsys.disabled():
        print(f"\n1,000 boards: {summary(report)}")
