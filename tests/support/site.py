"""A site with its real broker and its enrolment service, and mosquitto's own clients as strangers."""

import getpass
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from device.contract.topics import DeviceId
from device.identity import CERTIFICATE, DIRECTORY, enrol
from host.fleet.enrolment import serve_enrolment
from host.fleet.site import Site, SiteSettings, create_site
from host.monitor.broker import find_mosquitto
from tests.support.broker import find_free_port, wait_until_listening
from tests.support.patience import PATIENCE

SITE = "lab"


@dataclass
class RunningSite:
    """A site whose broker runs; `directory` has room for boards."""

    site: Site
    directory: Path
    port: int
    broker: subprocess.Popen[bytes]

    @property
    def authority(self) -> Path:
        return self.site.directory / "ca.pem"

    def enrol(self, device: str) -> Path:
        """The key and certificate of a board that enrols as a real one does."""
        root = self.directory / device
        with serve_enrolment(self.site, "127.0.0.1", self.site.settings.enrol_port):
            enrol(root, DeviceId(SITE, device), self.site.make_token(device))
        return root / DIRECTORY / CERTIFICATE

    def hear(self, identity: Path | None, topic: str, *, extra: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start `mosquitto_sub`; the caller ends it, or it ends by itself after a minute."""
        options = ["-W", "60", "-q", "1", "-F", "%t %p", "-t", topic, *extra]
        return subprocess.Popen(
            self.command("mosquitto_sub", identity, options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def say(self, identity: Path | None, topic: str, text: str, *, extra: tuple[str, ...] = ()) -> bool:
        """Run `mosquitto_pub` once, with MQTT 5, so that a refusal is told; returns whether the broker took it."""
        command = self.command("mosquitto_pub", identity, ["-q", "1", "-t", topic, "-m", text, *extra])
        done = subprocess.run(command, capture_output=True, text=True, timeout=20 * PATIENCE, check=False)
        return done.returncode == 0 and "failed" not in done.stderr

    def command(self, program: str, identity: Path | None, options: list[str]) -> list[str]:
        files = ["--cert", str(identity), "--key", str(identity)] if identity else []
        where = ["-h", "localhost", "-p", str(self.port), "--cafile", str(self.authority), "-V", "mqttv5"]
        return [str(shutil.which(program)), *where, *files, *options]


def make_site(directory: Path) -> Site:
    """A site on free ports of this machine."""
    settings = SiteSettings(
        site=SITE, broker_hostname="localhost", broker_port=find_free_port(), enrol_port=find_free_port()
    )
    return create_site(directory / "sites" / SITE, settings)


@contextmanager
def running_site(directory: Path) -> Iterator[RunningSite]:
    """A site and its mosquitto, with the configuration as generated; skips where a program is missing."""
    program = find_mosquitto()
    for name, found in (("mosquitto", program), *((n, shutil.which(n)) for n in ("mosquitto_pub", "openssl"))):
        if found is None:
            pytest.skip(f"{name} is not installed")
    site = make_site(directory)
    broker = site.directory / "broker"
    config = broker / "mosquitto.conf"
    with config.open("a") as file:  # started by root, it would become another user, who may not read a test's files
        file.write(f"user {getpass.getuser()}\n")
    with (directory / "broker.log").open("wb") as log:
        process = subprocess.Popen([str(program), "-c", config], stdout=log, stderr=log)
    try:
        wait_until_listening(site.settings.broker_port)
        yield RunningSite(site, directory, site.settings.broker_port, process)
    finally:
        process.terminate()
        process.wait(timeout=10 * PATIENCE)
