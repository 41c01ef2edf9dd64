"""What is wrong with this machine, and what to do about it."""

import os
import shutil
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata, util
from pathlib import Path

from host.errors import FleetError

_PACKAGES = ("torch", "timm", "litert-torch", "ai-edge-quantizer", "ai-edge-litert", "coremltools", "tuf", "paho-mqtt")
_FREE_BYTES = 2 << 30
_RENEWAL = timedelta(days=60)
"""No board can connect once a broker's certificate has ended, and someone must be there to renew it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. `required` ones must be `ok` before the loop can run."""

    name: str
    ok: bool
    text: str
    required: bool = True

    def row(self) -> tuple[str, str, str]:
        mark = "ok" if self.ok else ("fix" if self.required else "note")
        return mark, self.name, self.text


def diagnose(sites: Path) -> list[Finding]:
    """Run every check, of the sites in a directory too; nothing is changed."""
    machine = [_python(), *map(_package, _PACKAGES), _torchvision(), _broker(), _browser(), _disk(), _loopback()]
    return machine + [_site(path.parent) for path in sorted(sites.glob("*/site.json"))]


def _site(directory: Path) -> Finding:
    """How long the certificate of a site's broker is good; boards renew theirs themselves."""
    from host.fleet.authority import Issued  # here: not everybody who asks has `cryptography`

    name = f"site {directory.name}"
    try:
        expires = Issued.read(directory / "broker" / "broker.pem").expires
    except FleetError as error:
        return Finding(name=name, ok=False, text=str(error), required=False)
    ok = expires > datetime.now(UTC) + _RENEWAL
    text = f"the broker's certificate is good until {expires:%Y-%m-%d}"
    advice = f"; renew it with 'fieldvit fleet renew-broker {directory.name} --sites {directory.parent}'"
    return Finding(name=name, ok=ok, text=text + ("" if ok else advice), required=False)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] == (3, 11)
    return Finding(
        name="python",
        ok=ok,
        text=version if ok else f"{version}; make the environment with Python 3.11: make env PYTHON=python3.11",
    )


def _package(name: str) -> Finding:
    try:
        return Finding(name=name, ok=True, text=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name=name, ok=False, text="not installed; run 'make env'")


def _torchvision() -> Finding:
    if util.find_spec("torchvision") is None:
        return Finding(name="torchvision", ok=False, text="not installed; run 'make env'")
    try:
        import host.models  # noqa: F401  # applies the guard for CPU builds, then imports timm
    except (ImportError, RuntimeError) as error:
        return Finding(name="torchvision", ok=False, text=f"does not import ({error}); run 'make clean env'")
    return Finding(name="torchvision", ok=True, text=metadata.version("torchvision"))


def _broker() -> Finding:
    found = shutil.which(
        "mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin:" + (os.environ.get("PATH", ""))
    )
    text = (
        found or "not installed; the embedded broker is used (for MQTT 5 and access rules: apt-get install mosquitto)"
    )
    return Finding(name="mosquitto", ok=bool(found), text=text, required=False)


def _browser() -> Finding:
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    return Finding(name="browser", ok=bool(found), text=found or "none found; page tests are skipped", required=False)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= _FREE_BYTES
    return Finding(name="disk", ok=ok, text=f"{free / 1e9:.1f} GB free here" + ("" if ok else "; free 2 GB"))


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return Finding(name="ports", ok=True, text="a loopback port can be opened")
    except OSError as error:
        return Finding(
            name="ports", ok=False, text=f"no loopback port can be opened ({error}); check limits and firewall"
        )
