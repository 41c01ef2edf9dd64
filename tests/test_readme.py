"""The README's commands run as they stand there, and its figures are those that the benchmarks wrote."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from host.errors import HostError
from host.quickstart.processes import find_device_python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_first_block_names_targets_and_stands_at_the_top():
    targets = re.findall(r"^make ([a-z-]+)", BLOCKS[0], re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["quickstart", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)
    assert README[: README.index("make quickstart")].count("\n") < 15


def test_local_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_results_are_the_measured_ones():
    table = json.loads((ROOT / "bench/results/quickstart_seeds.json").read_text())
    mean = next(row for row in table["rows"] if row["seed"] == "mean")
    for name in ("base_accuracy_float", "base_accuracy_int8", "all_accuracy_before", "all_accuracy_after"):
        assert f"{mean[name]:.2%}" in README, name


def test_commands_by_hand_run_in_their_order(tmp_path):
    try:
        device = find_device_python(None)
    except HostError as error:
        pytest.skip(str(error))
    (tmp_path / "host").symlink_to(ROOT / "host")
    commands = BLOCKS[1].splitlines()
    assert commands[0].startswith("cp ")
    commands.insert(1, "sed -i.bak -e 's/epochs = 60/epochs = 10/' -e 's/drop = 0.01/drop = 0.2/' my.toml")
    path = os.pathsep.join([str(Path(sys.executable).parent), str(device.parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "confirmed" in done.stdout
