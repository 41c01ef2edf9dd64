"""Board and monitor as their own processes, ended with the quickstart whatever happens."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host.errors import FleetError, HostError

_START_S = 60.0
_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class DeviceCommand:
    """How to call `fieldvit-device`: a Python that has only the device dependencies, and the board's data directory."""

    python: Path
    root: Path

    def words(self, *words: str) -> list[str]:
        verb, *rest = words
        return [str(self.python), "-m", "device.cli", verb, "--root", str(self.root), *rest]

    def json(self, *words: str, timeout_s: float = 300) -> dict[str, Any]:
        """Run a verb that prints JSON.

        Raises:
            FleetError: it failed; the message holds its own error line.
        """
        done = subprocess.run(  # our own command
            self.words(*words, "--json"), capture_output=True, text=True, timeout=timeout_s, env=device_environment()
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise FleetError(f"fieldvit-device {words[0]} failed with exit code {done.returncode}: {lines[-1]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def find_device_python(given: Path | None) -> Path:
    """The Python of an environment with only `fieldvit[device]`; `.venv-device` beside this one by default.

    Raises:
        HostError: there is none, or it lacks a device package; the message says how to make one.
    """
    python = given or Path(sys.prefix).parent / ".venv-device" / "bin" / "python"
    if not python.exists():
        raise HostError(f"{python}: no device environment; run 'make device-env', or name one with --device-python")
    probe = subprocess.run(
        [str(python), "-c", "import device.cli"], capture_output=True, text=True, env=device_environment()
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["it does not start"])[-1]
        raise HostError(f"{python}: cannot run the agent ({reason}); run 'make device-env' again")
    return python.absolute()  # not resolved: a virtual environment is known by the link


def device_environment() -> dict[str, str]:
    """This process's environment without what would lend the board our packages."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}


@contextmanager
def managed_process(
    command: Sequence[str], *, log: Path, name: str, env: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command beside us, its output in a log file; stop it at the end, by force if it must be."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(  # our own command
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
        try:
            yield process
        finally:
            stop(process)
    if process.returncode not in (0, -signal.SIGTERM, -signal.SIGKILL):
        print(f"note: {name} ended with exit code {process.returncode}; see {log}", file=sys.stderr)


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold a run's directory: a second quickstart must not take the board away from under the first.

    Raises:
        HostError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HostError(
                f"{directory}: another quickstart is running there; end it first, or name another place with --runs"
            ) from error
        yield


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask a process to end, then make it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: no more waiting
            process.kill()
            process.wait()


@contextmanager
def monitor_process(directory: Path, *, broker: str) -> Iterator[dict[str, Any]]:
    """Run `fieldvit monitor` on free ports; yields what it wrote into its ready file."""
    ready = directory / "monitor.json"
    ready.unlink(missing_ok=True)
    store, log = directory / "monitor.sqlite", directory / "monitor.log"
    command = [sys.executable, "-m", "host.cli", "monitor", "--store", str(store), "--broker", broker]
    command += ["--broker-port", "0", "--port", "0", "--ready-file", str(ready)]
    with managed_process(command, log=log, name="monitor") as process:
        wait_for(ready.exists, process=process, log=log, name="monitor", timeout_s=_START_S)
        yield json.loads(ready.read_text())


@contextmanager
def agent_process(device: DeviceCommand, *, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the agent as a board would."""
    with managed_process(device.words("run"), log=log, name="agent", env=device_environment()) as process:
        yield process


def wait_for(condition: Any, *, process: "subprocess.Popen[bytes]", log: Path, name: str, timeout_s: float) -> Any:
    """Poll until `condition()` is true and return its value.

    Raises:
        FleetError: the process ended or time ran out; the message shows the last line of its log.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines() or ["its log is empty"]
            what = f"ended with exit code {process.returncode}" if ended else f"was not ready within {timeout_s:.0f} s"
            raise FleetError(f"{name} {what}: {lines[-1]} (see {log})")
        time.sleep(0.05)
    return value
