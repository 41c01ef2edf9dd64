"""A board's certificate: got with a token, renewed by itself, and refused to anyone else; with the real service and openssl."""

import base64
import json
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device import identity
from device.contract.errors import EnrolmentError
from device.contract.topics import DeviceId
from device.identity import Enrolment, certificate_end, decode_token, enrol, read_enrolment, renew_if_due
from host.errors import FleetError
from host.fleet.enrolment import serve_enrolment
from host.fleet.site import Site, encode_token
from tests.support.site import SITE, make_site

CAMERA = DeviceId(SITE, "cam-1")
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """A site whose enrolment service runs."""
    made = make_site(tmp_path_factory.mktemp("site"))
    with serve_enrolment(made, "127.0.0.1", made.settings.enrol_port):
        yield made


def certificate(root: Path) -> bytes:
    return (root / "identity" / "device.pem").read_bytes()


def test_a_token_gives_a_certificate_and_the_key_stays_here(site: Site, tmp_path: Path):
    enrolment = enrol(tmp_path, CAMERA, site.make_token("cam-1"))
    path = tmp_path / "identity" / "device.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert certificate_end(path) == enrolment.expires
    assert enrolment.broker_table() == {
        "hostname": "localhost",
        "port": site.settings.broker_port,
        "ca_file": "identity/ca.pem",
        "cert_file": "identity/device.pem",
    }
    assert read_enrolment(tmp_path) == enrolment
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "ca.pem",
        "device.pem",
        "enrolment.json",
        "token.sha256",
    ]
    assert b"PRIVATE KEY" in path.read_bytes()
    database = (site.directory / "site.sqlite").read_bytes()
    assert b"PRIVATE KEY" not in database


def test_a_lost_answer_can_be_asked_for_again_but_the_token_is_good_once(site: Site, tmp_path: Path, monkeypatch):
    token = site.make_token("cam-2")
    accept = identity._accept
    monkeypatch.setattr(identity, "_accept", lambda *_, **__: (_ for _ in ()).throw(EnrolmentError("power cut")))
    with pytest.raises(EnrolmentError, match="power cut"):
        enrol(tmp_path / "a", DeviceId(SITE, "cam-2"), token)
    monkeypatch.setattr(identity, "_accept", accept)
    enrol(tmp_path / "a", DeviceId(SITE, "cam-2"), token)
    with pytest.raises(EnrolmentError, match="used already; make another"):
        enrol(tmp_path / "b", DeviceId(SITE, "cam-2"), token)
    assert not (tmp_path / "b" / "identity" / "device.pem").exists()


def test_a_set_up_that_is_repeated_keeps_the_certificate(site: Site, tmp_path: Path):
    token, other = site.make_token("cam-8"), DeviceId(SITE, "cam-9")
    first = enrol(tmp_path, DeviceId(SITE, "cam-8"), token)
    before = certificate(tmp_path)
    assert enrol(tmp_path, DeviceId(SITE, "cam-8"), token) == first
    assert certificate(tmp_path) == before
    with pytest.raises(EnrolmentError, match="not known here"):  # a token of this board is none of another's
        enrol(tmp_path, other, token)
    (tmp_path / "identity" / "device.pem").unlink()
    with pytest.raises(EnrolmentError, match="used already; make another"):
        enrol(tmp_path, DeviceId(SITE, "cam-8"), token)


def test_tokens_of_others_old_ones_and_replaced_ones_are_refused(site: Site, tmp_path: Path):
    with pytest.raises(EnrolmentError, match="not known here"):
        enrol(tmp_path, CAMERA, site.make_token("cam-9"))
    replaced = site.make_token("cam-1")
    site.make_token("cam-1")
    with pytest.raises(EnrolmentError, match="not known here"):
        enrol(tmp_path, CAMERA, replaced)
    later = Site(site.directory, clock=lambda: datetime.now(UTC) - timedelta(hours=100))
    with pytest.raises(EnrolmentError, match=r"expired|not known"):
        enrol(tmp_path, CAMERA, later.make_token("cam-1"))
    with pytest.raises(EnrolmentError, match="this is the site 'lab', not 'elsewhere'"):
        enrol(tmp_path, DeviceId("elsewhere", "cam-1"), site.make_token("cam-1"))


def test_a_service_of_another_authority_is_not_told_the_token(site: Site, tmp_path: Path):
    token = decode_token(site.make_token("cam-1"))
    other = encode_token(token.url, "0" * 64, token.secret)
    with pytest.raises(EnrolmentError, match="not the one that the token names"):
        enrol(tmp_path, CAMERA, other)
    nobody = encode_token("https://localhost:1", token.authority, token.secret)
    with pytest.raises(EnrolmentError, match="cannot be reached"):
        enrol(tmp_path, CAMERA, nobody)


@pytest.mark.parametrize("text", ["", "fv1.", "fv1.AAAA", "fv1.e30", "fv2.WyJhIl0", "fv1." + "!" * 40])
def test_a_damaged_token_is_refused_and_not_repeated(tmp_path: Path, text: str):
    with pytest.raises(EnrolmentError, match="copy all of what") as refused:
        enrol(tmp_path, CAMERA, text)
    assert not text[4:] or text[4:] not in str(refused.value)


@given(st.from_regex(r"https://[a-z0-9.-]{1,30}:[1-9][0-9]{0,3}", fullmatch=True), st.text(max_size=30))
def test_tokens_come_back(url, secret):
    token = decode_token(encode_token(url, "ab" * 32, secret))
    assert (token.url, token.authority, token.secret) == (url, "ab" * 32, secret)


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_no_token_text_is_an_unexpected_error(value):
    text = "fv1." + base64.urlsafe_b64encode(json.dumps(value).encode()).decode()
    with pytest.raises(EnrolmentError):
        decode_token(text)


def test_renewal_when_half_of_the_life_is_over(site: Site, tmp_path: Path):
    enrolment = enrol(tmp_path, CAMERA, site.make_token("cam-1"))
    before = certificate(tmp_path)
    assert renew_if_due(tmp_path, clock=lambda: enrolment.renew_after - 1) is None
    assert certificate(tmp_path) == before
    renewed = renew_if_due(tmp_path, clock=lambda: enrolment.renew_after + 1)
    after = certificate(tmp_path)
    assert renewed == read_enrolment(tmp_path)
    assert before.split(b"BEGIN CERT")[0] != after.split(b"BEGIN CERT")[0]  # a new key, too
    assert renew_if_due(tmp_path / "never enrolled") is None


def test_the_revoked_cannot_renew_and_keep_what_they_have(site: Site, tmp_path: Path):
    device = DeviceId(SITE, "cam-3")
    enrolment = enrol(tmp_path, device, site.make_token("cam-3"))
    before = certificate(tmp_path)
    site.revoke("cam-3")
    with pytest.raises(EnrolmentError, match="was revoked"):
        renew_if_due(tmp_path, clock=lambda: enrolment.expires)
    assert certificate(tmp_path) == before
    with pytest.raises(FleetError, match="no certificate or token to revoke"):
        site.revoke("cam-3")


def test_renewal_needs_the_certificate_itself(site: Site):
    with pytest.raises(EnrolmentError, match="needs the certificate"):
        identity._ask(site.settings.enrol_url, "/renew", {"csr": "x"}, identity._client_context(site.authority_pem))


def test_nonsense_and_silence_do_not_hold_up_the_service(site: Site, tmp_path: Path):
    port = site.settings.enrol_port
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    with socket.create_connection(("127.0.0.1", port)) as nonsense:
        nonsense.sendall(b"GET / HTTP/1.0\r\n\r\n")
    context = identity._client_context(site.authority_pem)
    for path, body in (
        ("/enrol", b"{"),
        ("/enrol", b"[" * 30_000),
        ("/enrol", b'{"site": 1}'),
        ("/x", b"{}"),
        ("/enrol", b"x" * 40_000),
    ):
        with pytest.raises(EnrolmentError, match=r"refused|cannot be reached"):
            identity._exchange(site.settings.enrol_url, "POST", path, body, context)
    started = time.monotonic()
    enrol(tmp_path, CAMERA, site.make_token("cam-1"))
    assert time.monotonic() - started < 5
    for connection in silent:
        connection.close()


@pytest.mark.parametrize(
    "request_text", ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"]
)
def test_a_bad_request_leaves_the_token_unused(site: Site, tmp_path: Path, request_text: str):
    token = site.make_token("cam-4")
    with pytest.raises(FleetError, match="certificate request cannot be read"):
        site.enrol("cam-4", decode_token(token).secret, request_text)
    enrol(tmp_path, DeviceId(SITE, "cam-4"), token)


def test_a_weak_key_is_refused(site: Site, tmp_path: Path):
    command = ["openssl", "req", "-new", "-newkey", "rsa:1024", "-nodes", "-keyout", tmp_path / "k", "-subj", "/CN=x"]
    request = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    with pytest.raises(FleetError, match="RSA of 2048 to 4096 bits"):
        site.enrol("cam-5", decode_token(site.make_token("cam-5")).secret, request)


def test_a_damaged_record_and_a_missing_openssl_say_what_to_do(tmp_path: Path, monkeypatch):
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "enrolment.json").write_text("{")
    with pytest.raises(EnrolmentError, match="enrol again with a token"):
        read_enrolment(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    with pytest.raises(EnrolmentError, match="apt install openssl"):
        certificate_end(tmp_path)


def test_renew_after_is_in_the_middle():
    known = {"site": "s", "device": "d", "url": "u", "authority": "a", "broker_hostname": "b", "broker_port": 1}
    assert Enrolment(**known, starts=10.0, expires=30.0).renew_after == 20.0
