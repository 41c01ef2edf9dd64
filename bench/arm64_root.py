"""An emulated arm64 Debian, made without root: packages unpacked into a folder, and the kernel told to run them in QEMU.

`Arm64.make` unpacks Debian's own arm64 packages (none of their scripts is run), QEMU's user emulator from the backports,
and arm64 wheels. `run` enters it in namespaces of its own, in which the emulator is registered for arm64 programs: children
that start children work, the machine's own settings stay as they are, and all ends with the command.

Needs a Debian or Ubuntu on another processor, Linux 6.7 or later (namespaces with a binfmt_misc of their own), and user
namespaces for this user (or root).

- QEMU's default processor multiplies matrices wrongly (its SVE and SME, with OpenBLAS): `QEMU_CPU` is cortex-a72, always,
  and `bench.arm64` looks at the product first.
- QEMU 7.2, that of Debian 12 itself, dies in LiteRT's loading: hence the backports.
- A shell is the first process: as such, Python would leave orphans that ended unburied.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.arm64_wheels import device_requirements, install_wheels
from host.errors import HostError

ROOT = Path(__file__).parents[1]
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE, EMULATOR_SUITE, EMULATOR_PACKAGE = "bookworm", "bookworm-backports", "qemu-user"
PACKAGES = (
    *("base-files", "base-passwd", "bash", "ca-certificates", "coreutils", "dash", "findutils", "grep", "libc-bin"),
    *("libstdc++6", "mosquitto", "mosquitto-clients", "openssl", "procps", "python3", "sed", "tzdata", "util-linux"),
)
CPU = "cortex-a72"
PYTHON, PYTHON_VERSION = "/usr/bin/python3", "3.11"
WHEELS = ("amqtt", "cryptography", "hypothesis", "jinja2", "pillow", "pytest", "rich", "starlette", "typer", "uvicorn")
"""Beside the device extra: what its tests use, of the host's side too; no PyTorch."""

_ENTER = r"""
set -eu
here=$1 work=$2
shift 2
mount -t binfmt_misc binfmt_misc "$here/binfmt"
magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
printf ':aarch64:M:0:%s:%s:%s:FP' "$magic" "$mask" "$here/qemu-aarch64" > "$here/binfmt/register"
mount -t proc proc "$here/root/proc"
for name in dev sys; do mount --rbind "/$name" "$here/root/$name"; done
mount --bind "$work" "$here/root/work"
mount -o remount,bind,ro "$here/root/work"
exec "$(command -v chroot || echo /usr/sbin/chroot)" "$here/root" /bin/sh -c 'cd /work; ulimit -c 0; "$@"; exit $?' sh "$@"
"""


class Arm64Error(HostError):
    """The emulated system cannot be made or entered here."""


@dataclass(frozen=True, slots=True)
class Arm64:
    """The emulated system in a directory; the repository is its `/work`, read-only."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "Arm64":
        """Make what is missing.

        Raises:
            Arm64Error: a program, the network or the kernel lacks something; the message says what.
        """
        system = cls(directory.resolve())
        for program in ("apt-get", "dpkg-deb", "tar", "unshare"):
            if shutil.which(program) is None:
                raise Arm64Error(f"{program} is not installed; this needs a Debian or Ubuntu")
        if not KEYRING.exists():
            raise Arm64Error(f"{KEYRING} is missing; install debian-archive-keyring")
        system.directory.mkdir(parents=True, exist_ok=True)
        system._step("qemu-aarch64", system._add_emulator)
        system._step("root", system._add_root)
        system._step("root/site", system._add_wheels)
        return system

    @property
    def emulator(self) -> str:
        """Its name, version and processor."""
        text = subprocess.check_output([self.directory / "qemu-aarch64", "--version"], text=True)
        version = re.search(r"version (\S+)", text)
        return f"qemu-aarch64 {version[1] if version else '?'}, {CPU}"

    def path(self, inside: str) -> Path:
        """Where a file of the emulated system lies here."""
        return self.directory / "root" / inside.lstrip("/")

    def add(self, file: Path, inside: str) -> None:
        """Copy a file in, whole or not at all."""
        target = self.path(inside)
        os.replace(shutil.copy(file, target.with_suffix(".partial")), target)

    def run(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, in `/work`.

        Raises:
            Arm64Error: the kernel does not let this user enter.
            subprocess.TimeoutExpired: it took longer, and was killed with all that it started.
        """
        variables = {
            "PATH": "/usr/bin:/usr/sbin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "QEMU_CPU": CPU,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "/site:/work",
            "PYTHONPYCACHEPREFIX": "/var/cache/python",
            **(environment or {}),
        }
        namespaces = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
        done = subprocess.run(
            [*namespaces, "sh", "-c", _ENTER, "sh", self.directory, ROOT, *command],
            env=variables | {"PATH": f"{variables['PATH']}:/bin:/sbin"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
        if re.match(r"(unshare|mount|sh|chroot): ", done.stderr):
            raise Arm64Error(
                f"cannot enter the emulated system ({done.stderr.splitlines()[0]}); it needs Linux 6.7 or later and user "
                "namespaces, which some systems give to root only"
            )
        return done

    def _step(self, name: str, make: Callable[[Path], Path]) -> None:
        """Make one part beside its place and move it there when it is whole."""
        target = self.directory / name
        if target.exists():
            return
        print(f"arm64: making {name}", file=sys.stderr, flush=True)
        partial = self.directory / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        os.replace(make(partial), target)
        shutil.rmtree(partial)

    def _add_emulator(self, partial: Path) -> Path:
        architecture = _run(["dpkg", "--print-architecture"]).strip()
        (package,) = _download(partial, architecture, EMULATOR_SUITE, EMULATOR_PACKAGE, with_dependencies=False)
        _unpack(package, partial, "./usr/bin/qemu-aarch64")
        return partial / "usr" / "bin" / "qemu-aarch64"

    def _add_root(self, partial: Path) -> Path:
        root = partial / "root"
        for name in ("bin", "sbin", "lib"):
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for package in _download(partial, "arm64", SUITE, *PACKAGES):
            _unpack(package, root)
        for name in ("passwd", "group"):  # what the script of base-passwd would do
            shutil.copy(root / "usr" / "share" / "base-passwd" / f"{name}.master", root / "etc" / name)
        (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        (root / "work").mkdir()
        (self.directory / "binfmt").mkdir(exist_ok=True)
        return root

    def _add_wheels(self, partial: Path) -> Path:
        requirements = [*device_requirements(), *WHEELS]
        install_wheels(requirements, PYTHON_VERSION, partial / "site", constraints=ROOT / "constraints" / "host.txt")
        return partial / "site"


def _download(
    directory: Path, architecture: str, suite: str, *packages: str, with_dependencies: bool = True
) -> list[Path]:
    """Packages of another architecture or suite, by an apt with a state of its own; their signatures are checked."""
    state = directory / "apt"
    (state / "lists" / "partial").mkdir(parents=True)
    archives = state / "archives"
    (archives / "partial").mkdir(parents=True)
    (state / "status").touch()
    (state / "sources").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {suite} main\n")
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::sourcelist": state / "sources",
    }
    apt = ["apt-get", "-qq", "-y", *(f"-o{name}={value}" for name, value in settings.items())]
    _run([*apt, "update"])
    if with_dependencies:
        _run([*apt, "install", "--download-only", *packages])
    else:
        _run([*apt, "download", *packages], directory=archives)
    return sorted(archives.glob("*.deb"))


def _unpack(package: Path, target: Path, *members: str) -> None:
    """Unpack a package's files; none of its scripts is run. Links that stand for directories are kept."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as packed:
        command = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", target, *members]
        unpacked = subprocess.run(command, stdin=packed.stdout, capture_output=True, text=True, check=False)
    if packed.returncode or unpacked.returncode:
        raise Arm64Error(f"{package.name} cannot be unpacked ({unpacked.stderr.strip()[-200:]})")


def _run(command: Sequence[str], *, directory: Path | None = None) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Arm64Error(f"{command[0]} failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout
