"""Ctrl-C in every stage of the quickstart: one clear line, nothing left running, and the next run goes on from there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from host.errors import HostError
from host.quickstart.processes import find_device_python
from tests.support.quickstart import run_quickstart_verb

BEGINS = {"train": "train: 1/", "quantize": "quantize: 0/", "export": "export: 0/", "field": "field: 0/"}


def interrupt_in(stage: str, runs: Path) -> tuple[int, list[str]]:
    """Start the quickstart, press Ctrl-C once `stage` has begun; returns exit code and what stood on stderr."""
    command = [sys.executable, "-m", "host.cli", "quickstart", "--short", "--runs", str(runs)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith(BEGINS[stage]):
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr.readlines()
    return process.returncode, lines


def processes_in(directory: Path) -> list[str]:
    """Command lines of processes that work in a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if str(directory) in words:
                found.append(words)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quickstart_survives_ctrl_c_in_every_stage(tmp_path):
    try:
        find_device_python(None)
    except HostError as error:
        pytest.skip(str(error))
    for stage in BEGINS:
        code, lines = interrupt_in(stage, tmp_path)
        assert code == 130, (stage, lines)
        assert [line for line in lines if line.startswith("error: ")] == [
            "error: interrupted; run the same command again, finished stages are kept\n"
        ]
        assert not any("Traceback" in line for line in lines), stage
        assert processes_in(tmp_path) == []
    done = run_quickstart_verb(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train: 1/1 finished before, not repeated" in done.stderr
