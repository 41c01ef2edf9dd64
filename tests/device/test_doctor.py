"""What the doctor finds besides a missing model: certificates, secrets, spool, owners, delegate."""

import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from device.config import AgentConfig, BrokerConfig
from device.contract.board import load_board
from device.contract.errors import ConfigError
from device.doctor_checks import (
    CERTIFICATE_DAYS,
    DAY_S,
    check_certificates,
    check_delegate,
    check_owner,
    check_runtime,
    check_secrets,
    check_spool,
    check_temperature,
)
from device.runtime import tflite_runtime
from device.spool import Spool
from tests.support.agent import Field

BROKER = BrokerConfig(hostname="hub", password_file="broker.secret", ca_file="ca.pem")
CONFIG = AgentConfig(site="lab", device="cam-1", board="generic-x86-64", broker=BROKER)


@pytest.mark.parametrize(("days", "ok"), [(CERTIFICATE_DAYS + 1, True), (CERTIFICATE_DAYS - 1, False), (-3, False)])
def test_certificates_and_their_expiry(tmp_path: Path, days: float, ok: bool):
    (finding,) = check_certificates(tmp_path, CONFIG, end_of=lambda _: days * DAY_S + 1, clock=lambda: 0.0)
    assert finding.ok is ok
    assert f"{abs(days):.0f} " in finding.text


def test_a_certificate_that_cannot_be_read(tmp_path: Path):
    def fail(path: Path) -> float:
        raise ConfigError(f"{path}: no certificate")

    (finding,) = check_certificates(tmp_path, CONFIG, end_of=fail)
    assert not finding.ok
    assert "see broker.ca_file" in finding.advice
    assert not list(check_certificates(tmp_path, replace(CONFIG, broker=None), end_of=fail))


def test_secrets_are_for_their_owner_alone(tmp_path: Path):
    secret, identity = tmp_path / "broker.secret", tmp_path / "identity"
    identity.mkdir()
    for path in (secret, identity / "device.pem", identity / "ca.pem"):
        path.write_text("secret")
        path.chmod(0o600)
    (identity / "ca.pem").chmod(0o644)  # no secret
    assert check_secrets(tmp_path, CONFIG).ok
    for path in (secret, identity / "device.pem"):
        path.chmod(0o640)
        finding = check_secrets(tmp_path, CONFIG)
        assert not finding.ok
        assert finding.advice == f"chmod 600 {path}"
        path.chmod(0o600)
    tmp_path.chmod(0o777)
    assert check_secrets(tmp_path, CONFIG).advice == f"chmod o-w {tmp_path}"
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_files_of_another_owner(tmp_path: Path):
    (tmp_path / "a").write_text("")
    assert check_owner(tmp_path).ok
    os.chown(tmp_path / "a", 12345, -1)
    finding = check_owner(tmp_path)
    assert not finding.ok
    assert str(tmp_path / "a") in finding.text


def test_the_spool(tmp_path: Path):
    assert check_spool(tmp_path, CONFIG).ok
    spool = Spool(tmp_path / "spool.db", max_bytes=1 << 20, max_age_s=1e6)
    spool.put("event", b"x")
    finding = check_spool(tmp_path, CONFIG)  # beside the agent
    assert (finding.ok, finding.text) == (True, "1 messages wait, 0 were dropped so far")
    spool.close()
    with sqlite3.connect(tmp_path / "spool.db") as db:
        db.execute("UPDATE counter SET value = 1000000 WHERE name = 'depth'")
    db.close()
    assert "the broker takes none" in check_spool(tmp_path, CONFIG).advice
    assert check_spool(tmp_path, replace(CONFIG, broker=None)).ok
    (tmp_path / "spool.db").write_bytes(b"no database at all" * 100)
    assert not check_spool(tmp_path, CONFIG).ok
    (tmp_path / "spool.db").rename(tmp_path / "spool.db.damaged")
    assert "set aside" in check_spool(tmp_path, CONFIG).text


def test_temperature(monkeypatch: pytest.MonkeyPatch):
    board = load_board("generic-x86-64")
    for celsius, ok in [
        (None, True),
        (board.budget.soc_temp_celsius, True),
        (board.budget.soc_temp_celsius + 1, False),
    ]:
        monkeypatch.setattr("device.doctor_checks.soc_temp_celsius", lambda celsius=celsius: celsius)
        assert check_temperature(board).ok is ok


def test_runtime_and_delegate(delegate_library: Callable[..., Path]):
    runtime = load_board("generic-x86-64").runtime
    assert check_runtime().text.startswith(str(tflite_runtime()))
    assert "xnnpack" in check_delegate(runtime).text
    missing = check_delegate(replace(runtime, delegate="libnone.so.1"))
    assert (missing.ok, missing.text[:46]) == (True, "models run on the processor: delegate libnone.")
    library = str(delegate_library())
    assert check_delegate(replace(runtime, delegate=library)).text.startswith(library)


def test_the_verb_names_every_check(field: Field):
    field.cli("update")
    started = time.monotonic()
    result = field.cli("doctor")
    assert result.returncode == 0, result.stdout
    for check in (
        "disk",
        "clock",
        "trust",
        "model",
        "runtime",
        "delegate",
        "temperature",
        "secrets",
        "owner",
        "spool",
        "broker",
    ):
        assert f"ok     {check}: " in result.stdout
    assert time.monotonic() - started < 30
