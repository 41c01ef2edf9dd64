"""A real sshd on a free loopback port with host keys of its own, and a proxy that cuts the line after some bytes.

Started by root, it lets a user in who is made for the test; else only the user who runs the tests.
"""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.broker import find_free_port, wait_until_listening


@dataclass(frozen=True)
class SshServer:
    """Where it listens, who may come in, and what a client needs."""

    port: int
    user: str
    key: Path
    known_hosts: Path
    home: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run something as that user, beside ssh."""
        as_user = ["runuser", "-u", self.user, "--"] if os.geteuid() == 0 else []
        return subprocess.run([*as_user, *command], capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def ssh_server() -> Iterator[SshServer]:
    """Run sshd until the block ends. Skips the test where it, or the client, is not installed.

    Its directory is not one of pytest's, which are closed to other users and are closed again by each run.
    """
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if sshd is None or shutil.which("ssh-keygen") is None:
        pytest.skip("sshd or ssh is not installed")
    with tempfile.TemporaryDirectory(prefix="sshd-") as name, _user() as user:
        yield from _serve(sshd, Path(name), user)


def _serve(sshd: str, directory: Path, user: str) -> Iterator[SshServer]:
    directory.chmod(0o755)
    for name in ("host", "other", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    home = directory / "home"
    home.mkdir()
    shutil.chown(home, user)
    authorized = directory / "authorized"
    authorized.write_bytes((directory / "client.pub").read_bytes())
    authorized.chmod(0o644)
    port = find_free_port()
    config = directory / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {authorized}\n"
        f"PidFile none\nStrictModes no\nPasswordAuthentication no\nUsePAM no\nMaxStartups 100\nAllowUsers {user}\n"
    )
    known_hosts = directory / "known_hosts"
    public = (directory / "host.pub").read_text().rsplit(" ", 1)[0]
    known_hosts.write_text(f"[127.0.0.1]:* {public}\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = (directory / "sshd.log").open("wb")
    process = subprocess.Popen([sshd, "-D", "-e", "-f", config], stderr=log, stdout=log)
    try:
        wait_until_listening(port)
        yield SshServer(port, user, directory / "client", known_hosts, home)
    finally:
        process.terminate()
        process.wait(timeout=10)
        log.close()


@contextmanager
def _user() -> Iterator[str]:
    """Another user than this one, where this one may make users."""
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        yield getpass.getuser()
        return
    name = f"fieldvit-{os.getpid()}"  # tests run in several processes
    # -p '*': no password, but, unlike '!', not locked: sshd lets no locked user in
    subprocess.run(["useradd", "--system", "--shell", "/bin/sh", "-p", "*", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["userdel", name], check=False, capture_output=True)


@contextmanager
def cutting_proxy(port: int, limit: int | None) -> Iterator[int]:
    """Pass connections on to a port; after `limit` bytes towards it, all are cut. Yields the proxy's port."""
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = _Proxy(listener, port, limit)
    proxy.start()
    try:
        yield listener.getsockname()[1]
    finally:
        proxy.stop()


class _Proxy:
    def __init__(self, listener: socket.socket, port: int, limit: int | None) -> None:
        self._listener, self._port, self._left = listener, port, limit
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._listener.close()
        self._cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            threading.Thread(target=self._pass_on, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_counted: bool) -> None:
        try:
            while chunk := source.recv(4096):
                if is_counted and self._left is not None:
                    chunk = chunk[: max(self._left, 0)]
                    self._left -= len(chunk)
                target.sendall(chunk)
                if is_counted and self._left is not None and self._left <= 0:
                    self._cut()
                    return
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _cut(self) -> None:
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
