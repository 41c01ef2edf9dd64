"""A site from its making to a board that is told what to do: verbs, files, and everything over TLS with real processes."""

import json
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from device.contract.topics import DeviceId
from device.identity import enrol
from host.cli import main, parse_broker
from host.doctor import diagnose
from host.errors import FleetError, MonitorError, RecipeError
from host.fleet.authority import BROKER_DAYS
from host.fleet.broker_files import access_rules
from host.fleet.commands import Commander, parse_arguments, take_image
from host.fleet.enrolment import serve_enrolment
from host.fleet.site import IDENTITIES, Site, SiteSettings, create_site
from host.monitor.app import MonitorConfig, _broker
from host.monitor.broker import parse_broker_url, site_broker
from host.monitor.ingest import Ingest
from host.monitor.store import open_store
from tests.support.agent import DEVICE_PYTHON, REPO_ROOT
from tests.support.site import SITE, RunningSite, running_site

CAMERA = DeviceId(SITE, "cam-1")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_verbs_make_a_site_let_a_board_in_and_shut_it_out(capsys, tmp_path: Path):
    sites = tmp_path / "sites"
    assert run(capsys, "fleet", "init", "lab", "--out", sites, "--broker", "127.0.0.1")[0] == 0
    assert run(capsys, "fleet", "init", "lab", "--out", sites)[2].startswith("error: ")
    code, token, _ = run(capsys, "fleet", "token", "lab", "cam-1", "--sites", sites)
    assert (code, token[:4]) == (0, "fv1.")
    code, said, _ = run(capsys, "fleet", "revoke", "lab", "cam-1", "--sites", sites)
    assert (code, "0 certificates revoked" in said, "reload the broker" in said) == (0, True, True)
    assert "no certificate or token" in run(capsys, "fleet", "revoke", "lab", "cam-1", "--sites", sites)[2]
    names = [
        row["name"]
        for row in json.loads(run(capsys, "fleet", "list", "lab", "--json", "--sites", sites)[1])["certificates"]
    ]
    assert sorted(names) == ["@home-assistant", "@monitor", "@operator"]
    assert "@monitor" in run(capsys, "fleet", "list", "lab", "--sites", sites)[1]
    for bad in (
        ["token", "nowhere", "cam-1"],
        ["token", "lab", "cam 1"],
        ["enrol", "a/b"],
        ["token", "lab", "c", "--hours", "0"],
    ):
        code, _, said = run(capsys, "fleet", *bad, "--sites", sites)
        assert (code, said.count("\n")) == (15, 1)


def test_the_broker_s_certificate_is_shown_and_renewed_for_the_key_it_has(capsys, tmp_path: Path):
    site = create_site(tmp_path / "lab", SiteSettings(site="lab", broker_hostname="broker.local"))
    key, first = (tmp_path / "lab" / "broker" / "broker.key").read_bytes(), site.broker_certificate
    nearly_over = datetime.now(UTC) - timedelta(days=BROKER_DAYS - 30)
    old = Site(site.directory, clock=lambda: nearly_over).renew_broker()
    assert [(row.name, row.ok) for row in diagnose(tmp_path) if row.name.startswith("site")] == [("site lab", False)]
    assert f"{old.expires:%Y-%m-%d}" in run(capsys, "fleet", "list", "lab", "--sites", tmp_path)[1]

    code, said, _ = run(capsys, "fleet", "renew-broker", "lab", "--sites", tmp_path)
    assert (code, "reload the broker, so that it takes it" in said) == (0, True)
    listed = json.loads(run(capsys, "fleet", "list", "lab", "--json", "--sites", tmp_path)[1])["broker"]
    assert listed["expires"] == site.broker_certificate.expires.timestamp() >= first.expires.timestamp()
    assert len({listed["serial"], first.serial, old.serial}) == 3
    assert (tmp_path / "lab" / "broker" / "broker.key").read_bytes() == key
    ssl.create_default_context().load_cert_chain(tmp_path / "lab/broker/broker.pem", tmp_path / "lab/broker/broker.key")
    assert [row.ok for row in diagnose(tmp_path) if row.name == "site lab"] == [True]

    (tmp_path / "lab" / "broker" / "broker.key").write_text("nothing")
    assert "broker.key: no usable key" in run(capsys, "fleet", "renew-broker", "lab", "--sites", tmp_path)[2]


def test_secrets_are_their_owner_s_and_a_site_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    site = create_site(tmp_path / "lab", SiteSettings(site="lab", broker_hostname="broker.local"))
    secret = [path for path in site.directory.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert len(secret) == 2 + len(IDENTITIES)
    assert {path.stat().st_mode & 0o077 for path in [site.directory, *secret]} == {0}
    monkeypatch.setattr("host.fleet.site.mosquitto_config", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create_site(tmp_path / "other", SiteSettings(site="other", broker_hostname="h"))
    assert [path.name for path in tmp_path.iterdir()] == ["lab"]


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "a b"},
        {"broker_port": 0},
        {"broker_hostname": "a/b"},
        {"broker_hostname": ""},
        {"broker_hostname": "a b"},
        {"device_days": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError if "site" in changes else FleetError):
        SiteSettings(**{"site": "lab", "broker_hostname": "h"} | changes)


def test_a_damaged_site_is_named(tmp_path: Path):
    site = create_site(tmp_path / "lab", SiteSettings(site="lab", broker_hostname="h"))
    (site.directory / "ca.key").write_text("damaged")
    with pytest.raises(FleetError, match=r"ca.key: no usable authority .*restore it from your backup"):
        Site(site.directory)
    with pytest.raises(FleetError, match="fieldvit fleet init"):
        site_broker(tmp_path / "none", "monitor")


def test_rules_shut_out_who_is_revoked_before_anything_else():
    rules = access_rules("lab", shut_out=["cam-9"])
    assert rules.index("user cam-9\ntopic deny #") < rules.index("user @monitor")


def test_a_command_goes_to_the_site_that_was_named(capsys, tmp_path: Path):
    create_site(tmp_path / "lab", SiteSettings(site="lab", broker_hostname="127.0.0.1", broker_port=9))
    code, _, said = run(capsys, "command", "home/cam-1", "status", "--site", tmp_path / "lab")
    assert (code, "home/cam-1: " in said, "is the site 'lab'; write lab/cam-1" in said) == (15, True, True)
    code, _, said = run(capsys, "command", "cam-1", "status", "--site", tmp_path / "lab")
    assert "broker 127.0.0.1:9: " in said


def test_words_become_arguments():
    words = ["max_fps=5", "results=true", 'frame_ids=["a"]', "label=red leaf", "source=dir:x=y"]
    assert parse_arguments(words) == {
        "max_fps": 5,
        "results": True,
        "frame_ids": ["a"],
        "label": "red leaf",
        "source": "dir:x=y",
    }
    for bad in (["max_fps"], ["=5"], ["a=1", "a=2"]):
        with pytest.raises(FleetError, match="write NAME=VALUE, each name once"):
            parse_arguments(bad)


def test_a_picture_is_written_where_it_was_asked_for(tmp_path: Path):
    assert take_image({"image": "AAEC", "width": 1}, tmp_path / "x.png") == {
        "width": 1,
        "image_bytes": 3,
        "image_file": str(tmp_path / "x.png"),
    }
    assert (tmp_path / "x.png").read_bytes() == b"\0\1\2"
    with pytest.raises(FleetError, match="cannot be read"):
        take_image({"image": "?"}, None)


def test_brokers_by_url_may_be_encrypted():
    assert parse_broker_url("mqtts://broker.local").port == 8883
    assert parse_broker_url("mqtts://broker.local").tls is not None
    assert parse_broker_url("mqtt://broker.local").tls is None
    with pytest.raises(MonitorError):
        parse_broker_url("https://broker.local")


def wait_until(is_true, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def let_in(site: RunningSite, root: Path) -> None:
    """What `fieldvit-device setup` does with a token."""
    with serve_enrolment(site.site, "127.0.0.1", site.site.settings.enrol_port):
        table = enrol(root, CAMERA, site.site.make_token("cam-1")).broker_table()
    broker = "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
    (root / "frames").mkdir()
    top = f'site = "{SITE}"\ndevice = "cam-1"\nboard = "generic-x86-64"\n'
    (root / "agent.toml").write_text(f"{top}[broker]\n{broker}")


def test_a_board_its_monitor_and_its_operator_meet_at_the_site_s_broker(capsys, tmp_path: Path):
    root = tmp_path / "board"
    python = DEVICE_PYTHON if DEVICE_PYTHON.exists() else sys.executable
    with running_site(tmp_path) as site:
        let_in(site, root)
        store = open_store(tmp_path / "monitor.sqlite")
        ingest = Ingest(store, site_broker(site.site.directory, "monitor"))
        ingest.start()
        agent = subprocess.Popen(
            [python, "-m", "device.cli", "run", "--root", root], cwd=REPO_ROOT, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: (row := store.device(CAMERA)) is not None and row.status == "online")
            site_option = ("--site", site.site.directory)
            code, said, _ = run(capsys, "command", CAMERA, "set-sampling", "max_fps=7", *site_option)
            assert (code, json.loads(said)["sampling"]["max_fps"]) == (0, 7.0)
            code, _, said = run(capsys, "command", CAMERA, "snapshot", *site_option)
            assert (code, "snapshot is off on this board" in said) == (15, True)
            code, _, said = run(capsys, "command", CAMERA, "learn", 'frame_ids=["a"]', "label=8", *site_option)
            assert (code, "expected str, got 8; text that looks like a number is quoted" in said) == (15, True)
            code, _, said = run(capsys, "command", CAMERA, "fly", *site_option)
            assert (code, "'fly' is no command; commands are learn, undo" in said) == (15, True)
            address = site_broker(site.site.directory, "operator")
            with Commander(address.hostname, address.port, tls=address.tls) as commander:
                assert commander.send(CAMERA, "diagnostics").result["certificate_expires"] > time.time() + 360 * 86400
        finally:
            agent.terminate()
            agent.wait(timeout=10)
        wait_until(lambda: store.device(CAMERA).status == "offline")
        ingest.stop()
        store.close()


def test_a_monitor_of_a_site_uses_its_broker_and_a_board_is_not_flashed_into_it(tmp_path: Path):
    site = create_site(tmp_path / "lab", SiteSettings(site="lab", broker_hostname="broker.local", broker_port=4883))
    with _broker(MonitorConfig(store=tmp_path / "m.sqlite", site=site.directory)) as running:
        assert (running.hostname, running.port, running.kind) == ("broker.local", 4883, "external")
        assert running.address.tls is not None
    with pytest.raises(RecipeError, match="with a certificate of its own"):
        parse_broker("mqtts://broker.local")
