"""Who may do what at a site's real mosquitto, with the generated configuration: topics x identities.

The strangers are mosquitto's own clients. A refused subscription is answered as if it were granted, so what counts is
what is delivered; a refused publish is told by MQTT 5's reason code, and what counts is again that nobody hears it.
"""

import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from device.config import BrokerConfig
from device.contract.errors import BrokerError
from device.contract.topics import KINDS, DeviceId
from device.doctor import examine
from device.doctor_checks import Finding
from device.home_assistant import install_topic, node_id, state_topic
from device.mqtt import Connection, probe
from device.spool import Spool
from host.fleet.authority import BROKER_DAYS, Authority, new_key, private_pem
from host.fleet.site import Site
from tests.support.site import SITE, RunningSite, running_site

SETTLE_S = 0.5  # for what was said to arrive
DEVICE_WRITES = {"state", "telemetry", "event", "result", "reply"}
DEVICE_READS = {"command", "frame"}
SITE_TOPICS = f"fieldvit/v1/{SITE}"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[RunningSite]:
    with running_site(tmp_path_factory.mktemp("access")) as running:
        yield running


@pytest.fixture(scope="module")
def identities(site, tmp_path_factory) -> dict[str, Path | None]:
    directory = tmp_path_factory.mktemp("identities")
    known = {"anonymous": None, "wrong authority": stranger(directory)}
    known |= {name: site.enrol(name) for name in ("own", "other", "revoked")}
    known |= {
        role: site.site.directory / "identities" / f"{role}.pem" for role in ("monitor", "operator", "home-assistant")
    }
    assert site.site.revoke("revoked") == 1
    assert site.site.reload_broker()
    time.sleep(SETTLE_S)
    return known


def finish(listener: subprocess.Popen[bytes]) -> bytes:
    """What it heard."""
    time.sleep(SETTLE_S)
    listener.terminate()
    return listener.communicate(timeout=20)[0]


def stranger(directory: Path) -> Path:
    """The right name, from an authority of the same name that somebody else made."""
    authority = Authority.create(directory, SITE)
    key, now = new_key(), datetime.now(UTC)
    issued = authority.issue_client(key.public_key(), SITE, "own", days=30, now=now)
    path = directory / "stranger.pem"
    path.write_bytes(private_pem(key) + issued.pem.encode())
    return path


def allowed_to_write(identity: str) -> set[str]:
    if identity == "operator":
        return {f"{SITE_TOPICS}/{device}/{kind}" for device in ("own", "other") for kind in DEVICE_READS}
    return {f"{SITE_TOPICS}/{identity}/{kind}" for kind in DEVICE_WRITES} if identity in ("own", "other") else set()


def allowed_to_read(identity: str) -> set[str]:
    kinds = {"monitor": DEVICE_WRITES, "operator": {"reply", "state"}}.get(identity, set())
    everyone = {f"{SITE_TOPICS}/{device}/{kind}" for device in ("own", "other") for kind in kinds}
    own = {f"{SITE_TOPICS}/{identity}/{kind}" for kind in DEVICE_READS} if identity in ("own", "other") else set()
    return everyone | own


TOPICS = [f"{SITE_TOPICS}/{device}/{kind}" for device in ("own", "other") for kind in KINDS]
FOREIGN = ["fieldvit/v1/elsewhere/own/telemetry", "other/topic"]


@pytest.mark.slow
def test_matrix_of_topics_and_identities(site, identities):
    """Everyone listens to everything, everyone says everything: only what the rules allow arrives."""
    listeners = {
        name: site.hear(
            identities[name],
            "#",
            extra=("-t", "$SYS/#", "-t", f"{SITE_TOPICS}/+/command", "-t", f"{SITE_TOPICS}/+/frame"),
        )
        for name in ("anonymous", "wrong authority", "revoked", "monitor")
    }
    time.sleep(SETTLE_S)
    for name in identities.keys() - {"monitor"}:  # it has one connection, and is listening
        for topic in [*TOPICS, *FOREIGN]:
            accepted = site.say(identities[name], topic, f"{name}:{topic}")
            assert accepted == (topic in allowed_to_write(name)), (name, topic)
    heard = {name: finish(process).decode() for name, process in listeners.items()}
    for name in ("anonymous", "wrong authority", "revoked"):
        assert heard[name] == ""
    texts = {line.split(" ", 1)[1] for line in heard["monitor"].splitlines()}
    readable = allowed_to_read("monitor")
    assert texts == {f"{n}:{t}" for n in ("own", "other") for t in allowed_to_write(n) & readable}


@pytest.mark.parametrize("identity", ["own", "operator"])
def test_each_hears_only_its_own(site, identities, identity):
    listener = site.hear(identities[identity], "#", extra=("-t", "$SYS/#", "-t", "fieldvit/v1/+/+/+"))
    time.sleep(SETTLE_S)
    writers = {name: identities[name] for name in ("own", "other", "operator") if name != identity}
    expected = set()
    for name, pem in writers.items():
        for topic in allowed_to_write(name):
            assert site.say(pem, topic, f"to {identity}")
            expected |= {topic} & allowed_to_read(identity)
    heard = {line.split(" ", 1)[0] for line in finish(listener).decode().splitlines()}
    assert heard == expected


def test_the_monitor_cannot_speak(site, identities):
    for topic in [*TOPICS, *FOREIGN]:
        assert not site.say(identities["monitor"], topic, "no"), topic


def test_home_assistant_is_told_by_each_board_of_itself_alone(site, identities):
    own = DeviceId(SITE, "own")
    config = f"homeassistant/sensor/{node_id(own)}/latency/config"
    state, install = state_topic(own, "homeassistant"), install_topic(own, "homeassistant")
    home = site.hear(identities["home-assistant"], "homeassistant/#")
    board = site.hear(identities["own"], install)
    time.sleep(SETTLE_S)
    for topic in (config, state, install):
        assert site.say(identities["other"], topic, "forged") is False
    assert site.say(identities["operator"], install, "forged") is False
    finish(board)  # one connection each
    for topic in (config, state):
        assert site.say(identities["own"], topic, "mine")
    assert {line.split(" ", 1)[1] for line in finish(home).decode().splitlines()} == {"mine"}
    board = site.hear(identities["own"], install)
    time.sleep(SETTLE_S)
    assert site.say(identities["home-assistant"], install, "now")
    assert not site.say(identities["home-assistant"], f"{SITE_TOPICS}/own/command", "now")
    assert finish(board).endswith(b"now\n")


def test_another_s_client_id_takes_over_nothing(site, identities):
    """Neither the connection nor what waits for it: the broker makes everyone's client id the name in the certificate."""
    mine = ("-i", f"fieldvit-{SITE}-own", "-c", "-x", "-1")
    victim = site.hear(identities["own"], f"{SITE_TOPICS}/own/command", extra=mine)
    time.sleep(SETTLE_S)
    thief = site.hear(identities["other"], f"{SITE_TOPICS}/own/command", extra=mine)
    for name in ("own", f"fieldvit-{SITE}-own"):
        site.say(identities["other"], f"{SITE_TOPICS}/other/event", "hello", extra=("-i", name))
    assert finish(thief) == b""
    assert site.say(identities["operator"], f"{SITE_TOPICS}/own/command", "order")
    assert b"order" in finish(victim)


def test_the_agent_s_own_connection_is_let_in_and_others_are_told(site, identities):
    own = BrokerConfig(
        hostname="localhost", port=site.port, ca_file=str(site.authority), cert_file=str(identities["own"])
    )
    probe(own, site.directory)
    for bad in ("revoked", "wrong authority"):
        config = BrokerConfig(
            hostname="localhost", port=site.port, ca_file=str(site.authority), cert_file=str(identities[bad])
        )
        with pytest.raises(BrokerError):
            probe(config, site.directory)
    with pytest.raises(BrokerError):
        probe(BrokerConfig(hostname="localhost", port=site.port, ca_file=str(site.authority)), site.directory)


def test_a_running_broker_takes_a_new_certificate(site, identities, tmp_path):
    known = {"ca_file": str(site.authority), "cert_file": str(identities["own"])}
    broker = BrokerConfig(hostname="localhost", port=site.port, **known)
    assert probe(broker, tmp_path) == site.site.broker_certificate.expires.timestamp()
    open_before = site.hear(identities["monitor"], f"{SITE_TOPICS}/own/event")
    time.sleep(SETTLE_S)
    last_month = Site(site.site.directory, clock=lambda: datetime.now(UTC) - timedelta(days=30))
    renewed = last_month.renew_broker()
    assert site.site.reload_broker()
    time.sleep(SETTLE_S)
    assert probe(broker, tmp_path) == renewed.expires.timestamp()
    assert site.say(identities["own"], f"{SITE_TOPICS}/own/event", "still here")
    assert b"still here" in finish(open_before)


def test_the_doctor_on_a_board_says_how_long_the_broker_s_certificate_is_good(site, identities, tmp_path):
    (tmp_path / "agent.toml").write_text(
        f'site = "{SITE}"\ndevice = "own"\nboard = "generic-x86-64"\n[broker]\nhostname = "localhost"\n'
        f'port = {site.port}\nca_file = "{site.authority}"\ncert_file = "{identities["own"]}"\n'
    )

    def broker() -> Finding:
        return next(finding for finding in examine(tmp_path) if finding.check == "broker")

    assert broker().ok
    nearly_over = datetime.now(UTC) - timedelta(days=BROKER_DAYS - 5)
    Site(site.site.directory, clock=lambda: nearly_over).renew_broker()
    try:
        assert site.site.reload_broker()
        time.sleep(SETTLE_S)
        found = broker()
    finally:
        site.site.renew_broker()
        site.site.reload_broker()
    assert (found.ok, "valid for 5 more days" in found.text) == (False, True)
    assert "fieldvit fleet renew-broker" in found.advice


@pytest.mark.slow
def test_a_connection_that_is_open_when_its_board_is_revoked_hears_and_says_nothing_more(site, identities):
    pem = site.enrol("gone")
    listener = site.hear(pem, f"{SITE_TOPICS}/gone/command")
    monitor = site.hear(identities["monitor"], f"{SITE_TOPICS}/gone/+")
    time.sleep(SETTLE_S)
    talker = subprocess.Popen(
        site.command("mosquitto_pub", pem, ["-q", "1", "-t", f"{SITE_TOPICS}/gone/event", "-l", "-i", "x"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # the same name: it takes the listener's place, and stays connected
    time.sleep(SETTLE_S)
    talker.stdin.write(b"before\n")
    talker.stdin.flush()
    time.sleep(SETTLE_S)
    site.site.revoke("gone")
    assert site.site.reload_broker()
    time.sleep(SETTLE_S)
    talker.stdin.write(b"after\n")
    talker.stdin.close()
    site.say(identities["operator"], f"{SITE_TOPICS}/gone/command", "order")
    heard = finish(monitor).decode()
    assert "before" in heard
    assert "after" not in heard
    assert b"order" not in finish(listener)
    talker.wait(timeout=10)
    assert not site.say(pem, f"{SITE_TOPICS}/gone/event", "again")


def test_a_board_that_enrols_again_is_let_in_again(site, identities):
    site.enrol("back")
    site.site.revoke("back")
    site.site.reload_broker()
    pem = site.enrol("back")
    time.sleep(SETTLE_S)
    assert site.say(pem, f"{SITE_TOPICS}/back/event", "hello")


def test_a_broker_that_reads_its_files_again_keeps_those_who_are_away(site, identities):
    """Mosquitto before 2.1 frees a session that ends by time, and that it listed twice, once; ours do not."""
    asleep = BrokerConfig(
        hostname="localhost", port=site.port, ca_file=str(site.authority), cert_file=str(identities["own"])
    )
    for _ in range(8):
        probe(asleep, site.directory)
        for _ in range(2):
            assert site.site.reload_broker()
            time.sleep(SETTLE_S / 2)
    probe(asleep, site.directory)
    assert site.broker.poll() is None


def test_a_look_at_the_broker_leaves_the_agent_s_commands_there(site, identities, tmp_path):
    """`doctor` logs in under the name of the agent, whose session holds what came while it was away."""
    pem = site.enrol("asleep")
    config = BrokerConfig(hostname="localhost", port=site.port, ca_file=str(site.authority), cert_file=str(pem))
    commands: list[bytes] = []
    for is_awake in (True, False):
        spool = Spool(tmp_path / "spool.db", max_bytes=10**6, max_age_s=10**6)
        link = Connection(
            config,
            base=tmp_path,
            device=DeviceId(SITE, "asleep"),
            spool=spool,
            birth=lambda: b"{}",
            offline=b"{}",
            on_command=commands.append,
        )
        link.start()
        deadline = time.monotonic() + 10
        while not (link.is_connected and (is_awake or commands)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        link.stop(2.0)
        spool.close()
        if is_awake:
            assert site.say(identities["operator"], f"{SITE_TOPICS}/asleep/command", "order")
            probe(config, tmp_path)
    assert commands == [b"order"]
