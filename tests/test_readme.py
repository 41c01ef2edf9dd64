"""The README's commands run as they stand there, and its figures are those that the benchmarks wrote."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.quickstart_seeds import readme_table
from host.errors import HostError
from host.models.registry import create_model
from host.quickstart.metrics import missed_bounds
from host.quickstart.processes import find_device_python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def results(name):
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())["rows"]


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
    assert readme_table(results("quickstart_seeds")) in README
    for row in results("install_sizes"):
        assert f"{row['megabytes']} MB" in README, row
    model = create_model("efficientformer", "field-32", num_classes=8, in_chans=1)
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} million" in README


def test_the_published_seeds_keep_what_the_quickstart_promises():
    *seeds, mean = results("quickstart_seeds")
    assert len(seeds) == 5
    assert mean["all_accuracy_after"] >= 0.95
    for row in seeds:
        assert missed_bounds(row, training_too=True) == []
        assert row["seconds"] <= 300
        assert row["peak_memory_mb"] <= 4000


def test_commands_by_hand_run_in_their_order(tmp_path):
    try:
        device = find_device_python(None)
    except HostError as error:
        pytest.skip(str(error))
    (tmp_path / "host").symlink_to(ROOT / "host")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    commands = BLOCKS[1].splitlines()
    assert commands[1].startswith("sed ")
    commands.insert(2, "sed -i.bak -e 's/epochs = 60/epochs = 10/' -e 's/drop = 0.01/drop = 0.2/' my.toml")
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
