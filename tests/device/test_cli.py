"""Every verb: its help has an example, wrong input is one line with an exit code, and it works on a real board directory."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from device.lock import LockOwner, agent_lock, lock_owner
from device.slots import Slots
from tests.support.agent import Field, run_cli, wait_for
from tests.support.broker import find_free_port
from tests.support.patience import PATIENCE
from tests.support.tiny_bundle import LABELS, write_frames

VERBS = (
    *("run", "update", "status", "rollback", "learn", "undo", "learned"),
    *("infer", "selftest", "setup", "doctor"),
)


def require_one_error_line(result, exit_code: int, *texts: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == exit_code, result.stderr
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert not result.stdout
    for text in texts:
        assert text in lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_parses(verb: str):
    result = run_cli(verb, "--help")
    assert result.returncode == 0
    assert re.search(rf"example: fieldvit-device {verb}\b", result.stdout)
    assert "--root" in result.stdout


def test_help_lists_every_verb():
    assert all(verb in run_cli("--help").stdout for verb in VERBS)
    assert run_cli("fly").returncode == 2


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("doctor", "setup")])
def test_a_missing_root_is_one_line(tmp_path: Path, verb: str):
    extra = {"infer": ["frame.npy"], "learn": ["label", "frame.npy"], "learned": ["list"]}.get(verb, [])
    require_one_error_line(run_cli(verb, "--root", tmp_path / "none", *extra), 2, str(tmp_path / "none"), "--root DIR")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing key 'site', 'device', 'board'; add it"),
        ("sight = 3", "unknown key 'sight'"),
        ("= broken", "not TOML"),
        ('site = "a b"\ndevice = "d"\nboard = "generic-x86-64"', "site 'a b'"),
        ('site = "s"\ndevice = "d"\nboard = "toaster"', "board 'toaster' is unknown; choose one of"),
        (
            'site = "s"\ndevice = "d"\nboard = "generic-x86-64"\n[broker]\nhostname = "h"\nport = 0',
            "broker.port must be 1..65535",
        ),
        (
            'site = "s"\ndevice = "d"\nboard = "generic-x86-64"\n[runtime]\nthreads = 0',
            "runtime.threads must be above 0",
        ),
        (
            'site = "s"\ndevice = "d"\nboard = "generic-x86-64"\n[update]\nsource = "ftp:x"',
            "update.source must be dir:PATH",
        ),
        (
            'site = "s"\ndevice = "d"\nboard = "generic-x86-64"\n[source]\ncolour = 3',
            "agent.toml: source: unknown key 'colour'",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "agent.toml").write_text(text)
    require_one_error_line(run_cli("run", "--root", tmp_path), 2, message)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_wrong_ca_file_is_said_at_the_start(field: Field, content: str | None):
    field.configure(port=find_free_port())
    path, config = field.root / "ca.pem", field.root / "agent.toml"
    if content:
        path.write_text(content)
    config.write_text(config.read_text().replace("[broker]\n", '[broker]\nca_file = "ca.pem"\n'))
    require_one_error_line(
        field.cli("run"), 2, f"{path}: the broker's CA certificates cannot be read", "broker.ca_file"
    )
    result = field.cli("doctor")
    assert result.returncode == 1
    assert re.search(r"WRONG\s+broker: .*ca\.pem", result.stdout), result.stdout + result.stderr


def test_an_interrupted_update_is_one_line_and_leaves_nothing_half_done(field: Field):
    with field.start("update") as process:
        wait_for(lambda: Slots(field.root).state("a").state == "staged")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10 * PATIENCE)
    assert (process.returncode, output) == (130, b"")
    assert [line for line in errors.splitlines() if line.startswith(b"error: ")] == [b"error: interrupted"]
    assert b"Traceback" not in errors
    slots = Slots(field.root)
    assert (slots.state("a").state, slots.state("a").reason) == ("empty", "interrupted")
    assert not list((field.root / "slots").iterdir())
    assert not list((field.root / "downloads").iterdir())
    assert field.cli("update").returncode == 0


def test_update_fills_a_damaged_slot_again(field: Field):
    field.cli("update")
    (field.root / "slots" / "a" / "labels.txt").write_bytes(b"damaged")
    assert "installed and confirmed" in field.cli("update").stdout


def test_status_describes_the_agent_that_runs_and_no_other(field: Field):
    field.cli("update")
    table = json.loads(field.cli("status", "--json").stdout)
    assert (table["running"], table["pid"], table["modules_ok"], table["state"]) == (False, None, None, "confirmed")
    (field.root / "agent.json").write_text('{"pid": 1, "connected": true, "modules_ok": true}')  # of one that died
    for purpose, is_running, text in (
        ("update", False, "agent: not running"),
        ("run", True, "agent: running, process"),
    ):
        with agent_lock(field.root, purpose):
            table = json.loads(field.cli("status", "--json").stdout)
            assert (table["running"], table["modules_ok"]) == (is_running, None)
            assert "connected" not in table
            assert table["pid"] == (os.getpid() if is_running else None)
            assert text in field.cli("status").stdout


def test_who_looks_at_the_lock_stops_no_agent(tmp_path: Path):
    with agent_lock(tmp_path, "run"):
        assert lock_owner(tmp_path) == LockOwner("run", os.getpid())
    assert lock_owner(tmp_path) is None
    with (tmp_path / "agent.lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.2, looking.close).start()
        with agent_lock(tmp_path, "run"):
            pass


def test_a_disk_that_became_read_only_is_locked_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with agent_lock(tmp_path, "update"):
        pass
    real = os.open

    def read_only(path: str | Path, flags: int, *rest: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("device.lock.os.open", read_only)
        with agent_lock(tmp_path, "run"):
            assert lock_owner(tmp_path) is not None
    assert lock_owner(tmp_path) is None


def test_verbs_without_a_model_say_what_to_do(field: Field):
    write_frames(field.root / "frames", 1, 0)
    require_one_error_line(field.cli("infer", field.root / "frames"), 3, "run 'fieldvit-device update'")
    require_one_error_line(field.cli("selftest"), 3, "run 'fieldvit-device update'")
    require_one_error_line(field.cli("rollback"), 3, "install one with 'fieldvit-device update'")
    require_one_error_line(field.cli("update", "--from", "dir:/nowhere"), 5, "refused (unreachable)", "/nowhere")
    assert json.loads(field.cli("status", "--json").stdout)["state"] == "empty"
    assert "no model is served; 'fieldvit-device update' installs" in field.cli("status").stdout


def test_a_board_by_hand(field: Field):
    result = field.cli("update", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "updated": True, "slot": "a", "state": "confirmed", "name": "tiny", "version": "1.0.0", "release": 1, "precision": "int8"
    }  # fmt: skip
    assert "is up to date" in field.cli("update").stdout
    frames = write_frames(field.directory / "photos", 3, 2) + write_frames(field.directory / "photos", 2, 3)
    table = json.loads(field.cli("infer", field.directory / "photos", frames[0], "--json").stdout)
    assert [answer["label"] for answer in table["results"]] == [LABELS[2]] * 3 + [LABELS[3]] * 2 + [LABELS[2]]
    assert (table["model"], table["precision"], table["learned_version"], table["modules_ok"]) == (
        "tiny 1.0.0",
        "int8",
        0,
        True,
    )
    assert set(table["latency_ms"]) == {"p50", "p90", "p99"}
    assert all(sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5) for answer in table["results"])
    assert (
        json.loads(field.cli("infer", frames[0], "--precision", "float32", "--json").stdout)["precision"] == "float32"
    )
    assert LABELS[2] in field.cli("infer", frames[0]).stdout
    assert json.loads(field.cli("selftest", "--json").stdout)["precision"] == "int8"

    field.publish(2)
    assert "tiny 2.0.0 int8 in slot b: installed and confirmed" in field.cli("update").stdout
    assert "back to tiny 1.0.0" in field.cli("rollback").stdout
    require_one_error_line(field.cli("update"), 5, "was rejected here before (rolled-back)", "--force")
    assert field.cli("update", "--force").returncode == 0
    history = field.cli("status", "--history").stdout
    assert "rejected (rolled-back) tiny 2.0.0 int8" in history
    assert "slot b: confirmed tiny 2.0.0 int8, served" in history


def test_infer_refuses_what_it_cannot_read(field: Field):
    field.cli("update")
    bad, odd = field.directory / "bad.pgm", field.directory / "odd.npy"
    bad.write_bytes(b"no image")
    np.save(odd, np.zeros((8, 8, 3), np.uint8))
    (field.directory / "empty").mkdir()
    require_one_error_line(field.cli("infer", "missing.png"), 9, "missing.png: no such file")
    require_one_error_line(field.cli("infer", bad), 9, "bad.pgm: not a binary PGM")
    require_one_error_line(field.cli("infer", odd), 9, "got uint8 [1, 8, 8, 3]")
    require_one_error_line(field.cli("infer", field.directory / "empty"), 9, "holds no frames")
    require_one_error_line(
        field.cli("infer", odd, "--precision", "int4"), 3, "has no int4 artifact; it has int8, float32"
    )


def test_damaged_slot_is_refused_and_the_model_before_takes_over(field: Field):
    field.cli("update")
    field.publish(2)
    field.cli("update")
    model = field.root / "slots" / "b" / "model.int8.tflite"
    model.write_bytes(model.read_bytes()[:-1])
    frame = write_frames(field.directory / "photos", 1, 0)[0]
    require_one_error_line(field.cli("infer", frame), 3, "model.int8.tflite: sha256")
    require_one_error_line(field.cli("selftest"), 3, "model.int8.tflite: sha256")
    assert "rejected (load)" in (field.cli("rollback").stderr + field.cli("status", "--history").stdout)
    assert json.loads(field.cli("infer", frame, "--json").stdout)["model"] == "tiny 1.0.0"


def test_doctor_says_what_is_wrong_and_what_to_do(field: Field):
    result = run_cli("doctor", "--root", field.directory / "none", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["findings"][0]["advice"].startswith("mkdir -p")
    field.configure(port=find_free_port())
    (field.root / "root.json").unlink()
    (field.root / "frames").rmdir()
    result = field.cli("doctor")
    assert result.returncode == 1
    for check in ("trust", "model", "frames", "broker"):
        assert re.search(rf"WRONG\s+{check}: .*\n\s+-> \S", result.stdout), result.stdout


def test_doctor_is_content_with_a_sound_board(field: Field, broker_port: int):
    field.configure(port=broker_port)
    field.cli("update")
    result = field.cli("doctor", "--json")
    table = json.loads(result.stdout)
    assert result.returncode == 0, table
    checks = [finding["check"] for finding in table["findings"]]
    assert checks == [
        *("root", "disk", "clock", "config", "board", "trust", "agent", "model", "runtime"),
        *("delegate", "temperature", "frames", "secrets", "owner", "spool", "broker"),
    ]


def test_numpy_takes_one_thread_on_a_board(tmp_path: Path):
    """Its own default is one for each core, for every resized frame."""
    script = (
        "import sys; from device.cli import main; main(['status', '--root', sys.argv[1]]); import numpy; "
        "print(open('/proc/self/status').read())"
    )
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=kept, capture_output=True, text=True, check=True
    )
    assert re.search(r"^Threads:\t1$", done.stdout, re.MULTILINE), done.stdout
