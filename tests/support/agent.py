"""A board's data directory, and the agent as a process of its own, as on a board."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device.last_run import kernel_boot_id
from host.fleet.repository import UpdateRepository
from tests.support.patience import PATIENCE
from tests.support.tiny_bundle import TinyModel, write_bundle

REPO_ROOT = Path(__file__).parents[2]
DEVICE_PYTHON = REPO_ROOT / ".venv-device" / "bin" / "python"
"""An environment with nothing but fieldvit[device], as `make` creates it; without it, this interpreter is used."""
PREFIX = "fieldvit/v1/lab/cam-1"


@dataclass
class Field:
    """One board and the update repository it trusts."""

    directory: Path
    model: TinyModel
    repository: UpdateRepository

    @classmethod
    def create(cls, directory: Path, model: TinyModel) -> "Field":
        repository = UpdateRepository.open_or_create(directory / "repo", directory / "keys")
        field = cls(directory, model, repository)
        field.root.mkdir()
        (field.root / "root.json").write_bytes(repository.root_bytes)
        (field.root / "frames").mkdir()
        field.configure()
        return field

    @property
    def root(self) -> Path:
        return self.directory / "root"

    def configure(
        self, *, port: int | None = None, top: str = "", source: str = "", update: str = "", runtime: str = ""
    ) -> None:
        """Write `agent.toml`; the texts are lines of TOML."""
        broker = f'[broker]\nhostname = "127.0.0.1"\nport = {port}\nkeepalive_s = 5\n' if port else ""
        defaults = "telemetry_interval_s = 0.5\nsoak_frames = 5\nsoak_s = 0.5\n"
        (self.root / "agent.toml").write_text(
            f'site = "lab"\ndevice = "cam-1"\nboard = "generic-x86-64"\n{top}\n{broker}'
            f'[source]\npoll_s = 0.05\n{source}\n[update]\nsource = "dir:{self.directory}/repo"\n{update}\n'
            f"[runtime]\n{runtime or defaults}"
        )

    def publish(
        self,
        release: int,
        *,
        model: TinyModel | None = None,
        files: dict[str, bytes] | None = None,
        channel: str = "stable",
        **changes: object,
    ) -> Path:
        """Put a bundle of that release into the repository, of another `model` than this board began with if one is given."""
        bundle = write_bundle(self.directory, model or self.model, release=release, files=files, **changes)
        self.repository.publish(bundle, channel)
        return bundle

    def cli(self, verb: str, *arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one verb to its end."""
        return run_cli(verb, "--root", self.root, *arguments, timeout_s=timeout_s)

    def start(self, verb: str) -> subprocess.Popen[bytes]:
        """Start one verb."""
        return subprocess.Popen(
            _command(verb, "--root", self.root), cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    @contextmanager
    def agent(self, *, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """Run the agent in a process group of its own; it is killed if the block leaves it running."""
        with (self.directory / "agent.log").open("ab") as log:
            process = subprocess.Popen(
                _command("run", "--root", self.root),
                cwd=REPO_ROOT,
                stderr=log,
                stdout=log,
                process_group=0,
                env=environment,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=10 * PATIENCE)

    def lose_power(self) -> None:
        """After a kill: the next start finds another kernel, so no crash of the agent is counted."""
        running = self.root / "running"
        if running.exists():
            running.write_text(running.read_text().replace(kernel_boot_id(), "another boot"))

    @property
    def log(self) -> str:
        return (self.directory / "agent.log").read_text()


def wait_for(is_true: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait until something is so."""
    timeout_s *= PATIENCE
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {timeout_s} s")
        time.sleep(0.005)


def run_cli(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `fieldvit-device` in a process of its own."""
    timeout_s *= PATIENCE
    return subprocess.run(
        _command(*arguments), cwd=REPO_ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def _command(*arguments: str | Path) -> list[str]:
    python = os.environ.get("FIELDVIT_DEVICE_PYTHON", str(DEVICE_PYTHON if DEVICE_PYTHON.exists() else sys.executable))
    return [python, "-m", "device.cli", *map(str, arguments)]
