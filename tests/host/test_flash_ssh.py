"""Flashing over a real sshd: whose key it is, what a cut leaves, what a repetition does, and what the board says."""

import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path

import pytest

from device.contract.topics import DeviceId
from host.bench.measure import Extent
from host.bench.run import bench_files
from host.errors import FleetError
from host.files import sha256_of
from host.fleet.flash import BoardSettings
from host.fleet.flash_ssh import Outcome, describe, flash_ssh, prepare_runtime
from host.fleet.repository import UpdateRepository
from host.fleet.runtime_wheel import build_runtime_wheel
from host.fleet.ssh import DEFAULT_ROOT, Remote, Target
from tests.support.agent import wait_for
from tests.support.sshd import SshServer, cutting_proxy, ssh_server
from tests.support.tiny_bundle import TinyModel, convert_tiny_model, write_bundle, wrong_golden
from tests.support.wheels import pack_wheel

SETTINGS = BoardSettings(id=DeviceId("home", "cam-1"), board="generic-x86-64")
BOARD_PYTHON = "/usr/bin/python3"


def has_venv() -> bool:
    check = "import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))"
    return Path(BOARD_PYTHON).exists() and subprocess.run([BOARD_PYTHON, "-c", check]).returncode == 0


needs_venv = pytest.mark.skipif(not has_venv(), reason="this system's own Python is not 3.11, or has no venv")


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with ssh_server() as server:
        yield server


@pytest.fixture
def remote(server: SshServer, request: pytest.FixtureRequest) -> Remote:
    lines: list[str] = []
    target = Target(user=server.user, host="127.0.0.1", port=server.port, root=f"{server.home}/{request.node.name}")
    return Remote(target=target, key=server.key, known_hosts=server.known_hosts, python=BOARD_PYTHON, tell=lines.append)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh:pi@cam.local", ("pi", "cam.local", 22, DEFAULT_ROOT)),
        ("ssh:pi@cam.local:2222/srv/field", ("pi", "cam.local", 2222, "/srv/field")),
        ("ssh://pi@10.0.0.7/data", ("pi", "10.0.0.7", 22, "/data")),
        ("ssh:pi@[fe80::1]:23", ("pi", "fe80::1", 23, DEFAULT_ROOT)),
    ],
)
def test_targets(text: str, expected: tuple[str, str, int, str]):
    target = Target.parse(text)
    assert (target.user, target.host, target.port, target.root) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("ssh:", "ssh:cam", "ssh:@cam", "ssh:pi@", "ssh:pi@cam:0", "ssh:pi@cam:x", "ssh:pi@-oProxyCommand=x"),
        *("ssh:-x@cam", "ssh:pi@cam;reboot", "ssh:pi@$(reboot)", "ssh:pi @cam"),
    ],
)
def test_odd_targets_are_refused(text: str):
    with pytest.raises(FleetError, match=r"write ssh:USER@HOST\[:PORT\]\[/PATH\]|cannot begin"):
        Target.parse(text)


def test_an_unknown_host_key_is_shown_and_not_accepted(remote: Remote, tmp_path: Path, server: SshServer):
    empty = tmp_path / "known hosts"
    empty.touch()
    with pytest.raises(FleetError) as caught:
        replace(remote, known_hosts=empty).ask("look", {"root": "/", "names": []})
    assert "its host key is not known here" in str(caught.value)
    assert fingerprint(server) in str(caught.value)
    assert f"ssh-keyscan -p {server.port} -t ed25519 127.0.0.1 >> {empty}" in str(caught.value)
    assert empty.read_text() == ""


def test_a_wrong_host_key_is_refused_with_the_next_step(remote: Remote, tmp_path: Path, server: SshServer):
    wrong = tmp_path / "known"
    public = (server.key.parent / "other.pub").read_text().rsplit(" ", 1)[0]
    wrong.write_text(f"[127.0.0.1]:{server.port} {public}\n")
    before = wrong.read_text()
    with pytest.raises(FleetError) as caught:
        replace(remote, known_hosts=wrong).ask("look", {"root": "/", "names": []})
    assert "its host key is not the one known for it: somebody may stand in between" in str(caught.value)
    assert fingerprint(server) in str(caught.value)
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in str(caught.value)
    assert wrong.read_text() == before


def fingerprint(server: SshServer) -> str:
    line = subprocess.run(
        ["ssh-keygen", "-lf", server.key.parent / "host.pub"], capture_output=True, text=True, check=True
    ).stdout
    return line.split()[1]


def test_a_stranger_is_not_let_in(remote: Remote, server: SshServer):
    with pytest.raises(FleetError, match=r"connection failed or was cut \(.*Permission denied"):
        replace(remote, key=server.key.parent / "other").ask("look", {"root": "/", "names": []})
    with pytest.raises(FleetError, match="connection failed or was cut"):
        replace(remote, target=replace(remote.target, port=1)).ask("look", {"root": "/", "names": []})


def test_a_board_without_python_or_with_a_closed_directory_is_said(remote: Remote):
    with pytest.raises(FleetError, match=r"has no python9; install Python 3\.11"):
        replace(remote, python="python9").ask("look", {"root": "/", "names": []})
    assert remote.ask("look", {"root": remote.target.root, "names": []})["is_writable"]
    if os.geteuid() == 0:
        assert not remote.ask("look", {"root": "/var/lib/none", "names": []})["is_writable"]


def receive(remote: Remote, path: Path) -> None:
    """Send one file, or what is missing of it."""
    sha256, size = sha256_of(path), path.stat().st_size
    incoming = remote.ask("look", {"root": remote.target.root, "names": []})["incoming"]
    if sha256 not in incoming:
        remote.send(path, sha256, offset=incoming.get(f"{sha256}.partial", 0), size=size)


@pytest.mark.parametrize("cuts", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_transfer_that_is_cut_goes_on_where_it_stopped(remote: Remote, tmp_path: Path, server: SshServer, cuts: int):
    path = tmp_path / "large.bin"
    path.write_bytes(random.Random(1).randbytes(3 << 20))
    rng, kept = random.Random(2), []
    for _ in range(cuts):
        with cutting_proxy(server.port, rng.randrange(60_000, 300_000)) as port:
            behind = replace(remote, target=replace(remote.target, port=port))
            with pytest.raises(FleetError):
                receive(behind, path)
        time.sleep(0.1)  # the board's end notices a little later
        kept.append(incoming_bytes(remote))
    assert kept == sorted(kept)
    assert kept[-1] > 0
    with cutting_proxy(server.port, (3 << 20) - kept[-1] + 200_000) as port:  # less than the whole file
        receive(replace(remote, target=replace(remote.target, port=port)), path)
    final = Path(remote.target.root) / "incoming" / sha256_of(path)
    assert final.read_bytes() == path.read_bytes()
    assert not list(final.parent.glob("*.partial"))


def incoming_bytes(remote: Remote) -> int:
    return sum(remote.ask("look", {"root": remote.target.root, "names": []})["incoming"].values())


def test_a_file_that_arrived_damaged_is_removed(remote: Remote, tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"content")
    with pytest.raises(FleetError, match="arrived damaged and was removed; flash again"):
        remote.send(path, "0" * 64, offset=0, size=7)
    assert remote.ask("look", {"root": remote.target.root, "names": []})["incoming"] == {}


def test_the_runtime_wheel_holds_the_device_alone_and_is_the_same_each_time(tmp_path: Path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    first, second = build_runtime_wheel(tmp_path / "1"), build_runtime_wheel(tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"device", "firmware_configs"}
    assert "device/app.py" in names
    assert "firmware_configs/generic-x86-64.toml" in names
    runtime = prepare_runtime(tmp_path)
    pinned = dict(line.split("==") for line in runtime.constraints.read_text().splitlines())
    assert {"numpy", "paho-mqtt", "tuf", "urllib3", "ai-edge-litert"} <= pinned.keys()
    assert "torch" not in pinned
    assert runtime.identity == prepare_runtime(tmp_path).identity


class Fleet:
    """A repository, wheels for a board without an index, and a board that is flashed."""

    def __init__(self, directory: Path, model: TinyModel, remote: Remote) -> None:
        self.directory, self.model, self.remote = directory, model, remote
        self.repository = UpdateRepository.open_or_create(directory / "repo", directory / "keys")
        self.root = Path(remote.target.root)

    def publish(self, release: int, **files: dict[str, bytes]) -> Path:
        bundle = write_bundle(self.directory, self.model, release=release, **files)
        self.repository.publish(bundle, "stable")
        return bundle

    def flash(self, bundle: Path, wheels: Path) -> Outcome:
        return flash_ssh(bundle, self.remote, repository=self.repository.directory, settings=SETTINGS, wheels=wheels)

    def tree(self) -> dict[str, tuple[str, int]]:
        """Content and time of every file; without what a board notes at each look for an update."""
        found = self.root.rglob("*")
        return {
            str(path): (sha256_of(path), 0 if "tuf" in path.parts else path.stat().st_mtime_ns)
            for path in found
            if path.is_file() and path.name not in ("agent.lock", "clock.json") and "__pycache__" not in path.parts
        }


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheels")
    for line in prepare_runtime(directory).constraints.read_text().splitlines():
        pack_wheel(metadata.distribution(line.partition("==")[0]), directory)
    (directory / "constraints.txt").unlink()
    for own in directory.glob("fieldvit-*.whl"):
        own.unlink()
    return directory


@pytest.mark.slow
@needs_venv
def test_a_board_from_nothing_to_a_model_that_is_taken_back(
    remote: Remote, server: SshServer, tmp_path: Path, wheels: Path, tiny_model: TinyModel
):
    fleet = Fleet(tmp_path, tiny_model, remote)
    first = fleet.flash(fleet.publish(1), wheels)
    assert (first.is_runtime_changed, first.are_files_changed, first.is_updated) == (True, True, True)
    assert (first.model["version"], first.model["state"]) == ("1.0.0", "confirmed")
    assert {path.lstat().st_uid for path in fleet.root.rglob("*")} == {fleet.root.stat().st_uid}
    assert fleet.root.owner() == server.user
    assert not (fleet.root / "incoming").exists()

    before = fleet.tree()
    (tmp_path / "tiny.tflite").write_bytes(tiny_model.tflite)
    again = fleet.flash(tmp_path / "tiny-1.0.0.fieldvit", wheels)
    assert not again.is_changed
    assert fleet.tree() == before

    result = bench_files(
        [tmp_path / "tiny.tflite"],
        Extent(queries=5),
        num_threads=1,
        command="",
        today=date.today(),
        report=print,
        board=remote,
    )
    assert result.rows[0].p50_ms > 0
    assert not list(fleet.root.glob("bench-*"))
    assert fleet.tree() == before

    second = fleet.flash(fleet.publish(2), wheels)
    assert (second.is_runtime_changed, second.is_updated, second.model["version"]) == (False, True, "2.0.0")

    bad = fleet.publish(3, files=wrong_golden(tiny_model))
    with pytest.raises(FleetError, match=r"did not take the bundle: .*golden features differ"):
        fleet.flash(bad, wheels)
    assert status(fleet, server)["version"] == "2.0.0"

    fourth = fleet.publish(4)
    with running_agent(fleet, server):
        with pytest.raises(FleetError, match=r"tiny 4\.0\.0 was taken back \(frames\): not one of \d+ frames"):
            fleet.flash(fourth, wheels)
        assert status(fleet, server)["version"] == "2.0.0"


@pytest.mark.slow
@needs_venv
def test_an_agent_that_runs_gets_the_new_runtime(
    remote: Remote, server: SshServer, tmp_path: Path, wheels: Path, tiny_model: TinyModel
):
    """By hand, it is stopped; by a service, it is restarted, and one that does not come up gets the runtime before."""
    fleet = Fleet(tmp_path, tiny_model, remote)
    assert fleet.flash(fleet.publish(1), wheels).agent == {"agent": ""}
    bundle, newer = fleet.publish(2), more_wheels(wheels, tmp_path / "newer", "iniconfig")
    with running_agent(fleet, server):
        done = fleet.flash(bundle, newer)
        assert (done.is_runtime_changed, done.agent, done.model["version"]) == (True, {"agent": "stopped"}, "2.0.0")
        assert "start it again" in describe(done, remote)[1]

    with service(fleet, server) as programs:
        done = fleet.flash(bundle, wheels)
        assert (done.is_runtime_changed, done.agent) == (True, {"agent": "restarted"})
        assert fleet.flash(bundle, wheels).agent == {"agent": ""}
        before = os.readlink(fleet.root / "runtime" / "current")
        (programs / "fails").touch()
        with pytest.raises(FleetError, match="does not start with the new runtime, it has the one before again"):
            fleet.flash(bundle, newer)
        assert os.readlink(fleet.root / "runtime" / "current") == before
        wait_for(lambda: bool(status(fleet, server)["running"]), timeout_s=30)


def more_wheels(wheels: Path, directory: Path, name: str) -> Path:
    """The same wheels and one more: another runtime."""
    shutil.copytree(wheels, directory)
    pack_wheel(metadata.distribution(name), directory)
    return directory


@contextmanager
def running_agent(fleet: Fleet, server: SshServer) -> Iterator[None]:
    """The agent on the board, with a camera whose frames no model can use."""
    config = fleet.root / "agent.toml"
    config.write_text(config.read_text() + "\n[runtime]\nsoak_s = 3\n")
    python = str(fleet.root / "runtime" / "current" / "bin" / "python")
    as_user = ["runuser", "-u", server.user, "--"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [*as_user, python, "-m", "device.cli", "run", "--root", str(fleet.root)],
        cwd=fleet.root,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stderr=subprocess.DEVNULL,
    )
    stop = threading.Event()
    camera = threading.Thread(target=make_frames, args=(fleet.root / "frames", stop))
    camera.start()
    try:
        wait_for(lambda: bool(status(fleet, server)["running"]), timeout_s=30)
        wait_for(lambda: "frames" in status(fleet, server), timeout_s=30)
        yield
    finally:
        stop.set()
        camera.join()
        server.run("kill", re.search(r"process (\d+)", (fleet.root / "agent.lock").read_text())[1])
        process.wait(timeout=20)


SYSTEMCTL = """#!/bin/sh
# what of systemd flashing asks for, where systemd does not run: a service with one main process
cd "$(dirname "$0")"
case "$*" in
*show*) cat pid; exit ;;
esac
[ -s pid ] && kill "$(cat pid)" && while kill -0 "$(cat pid)"; do sleep 0.1; done
[ -e fails ] && rm fails && exit 1
cd ROOT && ROOT/runtime/current/bin/python -m device.cli run --root ROOT > /dev/null 2>&1 < /dev/null &
echo $! > pid
"""


@contextmanager
def service(fleet: Fleet, server: SshServer) -> Iterator[Path]:
    """The agent as the main process of a service; a file `fails` beside `systemctl` has the next start fail, once."""
    programs = server.home / "programs"
    programs.mkdir()
    write_program(programs / "systemctl", SYSTEMCTL.replace("ROOT", str(fleet.root)))
    write_program(programs / "python", f'#!/bin/sh\nPATH={programs}:$PATH exec {BOARD_PYTHON} "$@"\n')
    (programs / "pid").touch()
    shutil.chown(programs, server.user)
    shutil.chown(programs / "pid", server.user)
    remote, fleet.remote = fleet.remote, replace(fleet.remote, python=str(programs / "python"))
    try:
        assert server.run("env", "-u", "PYTHONPATH", str(programs / "systemctl"), "restart").returncode == 0
        wait_for(lambda: bool(status(fleet, server)["running"]), timeout_s=30)
        yield programs
    finally:
        fleet.remote = remote
        server.run("kill", (programs / "pid").read_text().strip())


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_frames(directory: Path, stop: threading.Event) -> None:
    number = 0
    while not stop.wait(0.1):
        number += 1
        part = directory / f"{number:04d}.part"
        part.write_bytes(b"P6 8 8 255\n" + bytes(8 * 8 * 3))
        part.rename(part.with_suffix(".ppm"))


def status(fleet: Fleet, server: SshServer) -> dict[str, object]:
    python = str(fleet.root / "runtime" / "current" / "bin" / "python")
    done = server.run(
        "env",
        "-u",
        "PYTHONPATH",
        "-C",
        str(fleet.root),
        python,
        "-m",
        "device.cli",
        "status",
        "--json",
        "--root",
        str(fleet.root),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return convert_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_board_side_needs_nothing_of_ours():
    assert shutil.which("ssh")
    source = (Path(__file__).parents[2] / "host" / "fleet" / "board_side.py").read_text()
    assert not re.search(r"^(from|import) (host|device)", source, re.MULTILINE)
