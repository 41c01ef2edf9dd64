"""A board over SSH, by the system's own `ssh`: its agent, its configuration and its known hosts are those of the user.

The host key is checked, always: `StrictHostKeyChecking=yes`, and no password is ever asked for (`BatchMode`). A library
would bring its own idea of keys, agents and hardware tokens; `ssh` is on every machine that is used to reach boards.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from host.errors import FleetError
from host.fleet import board_side

DEFAULT_ROOT = "/var/lib/fieldvit"
CHUNK_BYTES = 1 << 16
_FAILED_TO_CONNECT = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`ssh:USER@HOST[:PORT][/PATH]`: where a board is, and its data directory."""

    user: str
    host: str
    port: int = 22
    root: str = DEFAULT_ROOT

    @classmethod
    def parse(cls, text: str, *, option: str = "--to") -> Self:
        """Read what was given for an option; FleetError says what is wrong with it."""
        rest = text.removeprefix("ssh:").removeprefix("//")
        address, slash, path = rest.partition("/")
        user, at, host = address.rpartition("@")
        host, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "22")
        host = host.removeprefix("[").removesuffix("]")
        is_name = (
            text.startswith("ssh:")
            and bool(user and host)
            and not any(c.isspace() or c in "'\"`$;&|<>()\\" for c in address)
        )
        if not at or not is_name or not port.isdecimal() or not 1 <= int(port) <= 65535 or user.startswith("-"):
            raise FleetError(f"{option} {text!r}: write ssh:USER@HOST[:PORT][/PATH]")
        if host.startswith("-"):
            raise FleetError(f"{option} {text!r}: a host cannot begin with '-'")
        return cls(user=user, host=host, port=int(port), root=f"/{path}" if slash and path else DEFAULT_ROOT)

    @property
    def name(self) -> str:
        return f"{self.user}@{self.host}" + (f":{self.port}" if self.port != 22 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Runs `host.fleet.board_side` on a board.

    Args:
        target: where.
        key: a private key's file; None: what the user's ssh chooses.
        known_hosts: a file of host keys; None: the user's.
        python: the interpreter there.
        tell: gets each line that the board says while it works.
    """

    target: Target
    key: Path | None = None
    known_hosts: Path | None = None
    python: str = "python3"
    tell: Callable[[str], None] = print

    def ask(self, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do something there; returns its answer.

        Raises:
            FleetError: there is no connection, its host key is not the known one, or the board reports an error.
        """
        with self._start(verb, arguments, stdin=subprocess.DEVNULL) as process:
            return self._finish(process)

    def send(
        self, path: Path, sha256: str, *, offset: int, size: int, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        """Send a file's bytes from an offset on; what arrives before a cut stays there.

        Raises:
            FleetError: as for `ask`.
        """
        arguments = {"root": self.target.root, "sha256": sha256, "size": size, "offset": offset}
        with self._start("receive", arguments, stdin=subprocess.PIPE) as process, path.open("rb") as file:
            assert process.stdin
            file.seek(offset)
            try:
                while chunk := file.read(CHUNK_BYTES):
                    process.stdin.write(chunk)
                    offset += len(chunk)
                    progress(offset)
            except BrokenPipeError:
                pass  # the board, or ssh, says why
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            answer = self._finish(process)
        if not answer["is_whole"]:
            raise FleetError(f"{self.target.name}: {path.name} did not arrive whole; try again, it goes on from there")

    def send_all(self, files: Mapping[str, Path], incoming: Mapping[str, int]) -> None:
        """Send files by their SHA-256, each from where an earlier cut left it.

        Args:
            files: what the board should have in `incoming`.
            incoming: what `look` found there, with sizes.

        Raises:
            FleetError: as for `ask`.
        """
        for sha256, path in files.items():
            size = path.stat().st_size
            if sha256 in incoming:  # whole already
                continue
            offset = incoming.get(f"{sha256}.partial", 0)
            offset = offset if offset <= size else 0
            progress = _percent(self.tell, path.name, size, offset)
            self.send(path, sha256, offset=offset, size=size, progress=progress)

    def _start(self, verb: str, arguments: Mapping[str, Any], *, stdin: int) -> "subprocess.Popen[bytes]":
        source = Path(board_side.__file__).read_text(encoding="utf-8")
        words = [self.python, "-c", source, verb, json.dumps(arguments)]
        remote = " ".join(shlex.quote(word) for word in words)
        command = [*self._ssh(), self.target.host, remote]
        return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def _ssh(self) -> list[str]:
        program = shutil.which("ssh")
        if program is None:
            raise FleetError(
                "the program ssh is not installed here; install it (Debian/Ubuntu: apt install openssh-client)"
            )
        options = ["StrictHostKeyChecking=yes", "BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=5"]
        options += ["ServerAliveCountMax=4", "ForwardAgent=no", "ForwardX11=no", "RequestTTY=no"]
        if self.known_hosts:
            options += [f"UserKnownHostsFile={self.known_hosts}", "GlobalKnownHostsFile=/dev/null"]
        if self.key:
            options += [f"IdentityFile={self.key}", "IdentitiesOnly=yes"]
        words = [word for option in options for word in ("-o", option)]
        return [program, *words, "-p", str(self.target.port), "-l", self.target.user]

    def _finish(self, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
        errors = []
        assert process.stderr
        for raw in process.stderr:
            line = raw.decode(errors="replace").rstrip()
            errors.append(line)
            if not _is_ssh(line) and not line.startswith("error: "):
                self.tell(f"{self.target.host}: {line}")
        assert process.stdout
        output = process.stdout.read()
        code = process.wait()
        if code:
            raise self._error(code, errors)
        try:
            answer = json.loads(output.decode(errors="replace").splitlines()[-1])
        except (ValueError, IndexError) as error:
            raise FleetError(
                f"{self.target.name}: answered {output[-80:]!r}, no JSON; is {self.python} a Python?"
            ) from error
        assert isinstance(answer, dict)
        return answer

    def _error(self, code: int, errors: Sequence[str]) -> FleetError:
        text = "\n".join(errors)
        name = self.target.name
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in text:
            return FleetError(self._about_host_key("its host key is not the one known for it", is_changed=True))
        if "Host key verification failed" in text or "host key is known for" in text:
            return FleetError(self._about_host_key("its host key is not known here", is_changed=False))
        said = [line.removeprefix("error: ") for line in errors if line.startswith("error: ")]
        if said:
            return FleetError(f"{name}: {said[-1]}")
        last = next((line for line in reversed(errors) if line.strip()), "no message")
        if code == _FAILED_TO_CONNECT:
            return FleetError(f"{name}: the connection failed or was cut ({last}); check it, then try again")
        if "not found" in last and self.python in last:
            return FleetError(f"{name}: has no {self.python}; install Python 3.11 or later there")
        return FleetError(f"{name}: failed with exit code {code} ({last})")

    def _about_host_key(self, problem: str, *, is_changed: bool) -> str:
        """What is known about the key that the board shows, and what to do; nothing is accepted here."""
        host, port = self.target.host, self.target.port
        shown = f"[{host}]:{port}" if port != 22 else host
        file = f" -f {self.known_hosts}" if self.known_hosts else ""
        target = self.known_hosts or "~/.ssh/known_hosts"
        compare = f"it shows {self._fingerprint()}; compare with 'ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub' on the board"
        accept = f"ssh-keyscan -p {port} -t ed25519 {host} >> {target}"
        if is_changed:
            return (
                f"{self.target.name}: {problem}: somebody may stand in between, or the board was installed anew; {compare}, "
                f"and only if it is the same: ssh-keygen -R '{shown}'{file}; {accept}"
            )
        return f"{self.target.name}: {problem}; {compare}, and if it is the same: {accept}"

    def _fingerprint(self) -> str:
        try:
            keys = subprocess.run(
                ["ssh-keyscan", "-T", "5", "-p", str(self.target.port), "-t", "ed25519", self.target.host],
                capture_output=True,
                timeout=15,
                check=False,
            ).stdout
            lines = subprocess.run(["ssh-keygen", "-lf", "-"], input=keys, capture_output=True, timeout=15, check=False)
            return lines.stdout.decode(errors="replace").split()[1]
        except (OSError, IndexError, subprocess.TimeoutExpired):
            return "a key that could not be read"


def _percent(tell: Callable[[str], None], name: str, size: int, offset: int) -> Callable[[int], None]:
    """Tells every quarter of a file that is large enough to wait for."""
    quarters = iter([size // 4, size // 2, size * 3 // 4, size])
    wanted = [next(quarters)]
    tell(f"sending {name}, {size} bytes" + (f", from byte {offset} on" if offset else ""))

    def progress(done: int) -> None:
        while size > 1 << 20 and done >= wanted[0]:
            tell(f"sending {name}: {100 * done // size} %")
            wanted[0] = next(quarters, size + 1)

    return progress


def _is_ssh(line: str) -> bool:
    """What ssh itself says of host keys: said again, more clearly, with the error."""
    words = ("@@@", "WARNING: REMOTE HOST", "IT IS POSSIBLE", "Someone could be", "Host key", "host key", "Offending")
    words += (
        "Please contact",
        "Add correct",
        "  remove with",
        "  ssh-keygen",
        "The fingerprint",
        "SHA256:",
        "Connection",
    )
    return line.startswith(words) or "host key is known" in line or not line.strip()
