"""The README's commands run as they stand there, and its figures are those that the benchmarks wrote."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.quickstart_seeds import readme_table
from device.contract.commands import ARGUMENTS
from device.contract.records import from_table
from host.errors import HostError
from host.fleet.commands import parse_arguments
from host.models.registry import create_model, list_models
from host.quickstart.metrics import missed_bounds
from host.quickstart.processes import find_device_python
from host.zoo import find_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def block_with(text):
    return next(block for block in BLOCKS if text in block)


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


def test_every_model_stands_in_the_table_of_families():
    rows = {line.split("`")[1]: line for line in README.splitlines() if line.startswith("| `") and line.count("|") == 4}
    for entry in list_models():
        variant = entry.variant.removesuffix("-distilled")
        assert f"`{variant}`" in rows[entry.family], entry.name


def test_checkpoints_that_are_named_exist():
    names = re.findall(r"run zoo:([a-z0-9-]+)", README)
    assert names
    assert all(find_checkpoint(name).is_file() for name in names)


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


def test_commands_to_boards_carry_what_their_verbs_take():
    taken = {}
    for line in re.findall(r"^fieldvit command (.*)$", README, re.MULTILINE):
        _, verb, *words = shlex.split(line)
        taken[verb] = parse_arguments([word for word in words if re.match(r"[a-z_]+=", word)])
    assert taken["learn"] == {"frame_ids": ["photo-1", "photo-2"], "label": "8"}
    assert taken["update"] == {"source": "dir:updates"}
    for verb, arguments in taken.items():
        from_table(ARGUMENTS[verb], arguments, where="README.md")


@pytest.mark.slow
def test_commands_by_hand_run_in_their_order(tmp_path):
    try:
        device = find_device_python(None)
    except HostError as error:
        pytest.skip(str(error))
    (tmp_path / "host").symlink_to(ROOT / "host")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    commands = block_with("sed ").splitlines()
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


@pytest.mark.slow
def test_photos_reach_a_board_as_the_readme_says(tmp_path):
    write_photos(tmp_path / "photos", per_class=40)
    recipe = (ROOT / "host/recipes/photos.toml").read_text()
    recipe = recipe.replace("epochs = 60", "epochs = 12").replace("batch_size = 64", "batch_size = 16")
    (tmp_path / "photos.toml").write_text(recipe.replace('"coreml"', "").replace('"tflite", ', '"tflite"'))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", block_with("photos.toml --flash")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "folder 'photos': " in done.stdout
    assert "board is ready for generic-x86-64" in done.stdout
    assert (tmp_path / "board" / "agent.toml").exists()


def write_photos(folder, *, per_class):
    """Pictures of three kinds that a small model can tell apart: stripes across, stripes down, a disc."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:72, :96]
    for name, wave in (("across", rows / 6), ("down", columns / 6), ("disc", np.hypot(rows - 36, columns - 48) / 12)):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            shade = 127 + 90 * np.sin(wave + rng.uniform(0, 6))[..., None] * rng.uniform(0.6, 1, 3)
            picture = shade + rng.normal(0, 12, (72, 96, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.jpg")


@pytest.mark.slow
def test_several_processes_run_a_recipe_as_the_readme_says(tmp_path):
    (tmp_path / "my.toml").write_text(SEVERAL)
    command = block_with("torchrun").splitlines()[0].replace("--nproc-per-node 4", "--standalone --nproc-per-node 2")
    command = command.replace("fieldvit run", "fieldvit train")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for _ in range(2):  # the second time it is finished, and both processes know it
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == ["runs/several/train"]
    assert "finished before" in done.stderr
    left = sorted(path.name for path in (tmp_path / "runs/several/train").iterdir())
    assert left == ["metrics.jsonl", "model.safetensors", "stamp.json"]


SEVERAL = """
name = "several"
data = { source = "digits" }
model = { family = "deit", variant = "field-32" }
train = { epochs = 2, batch_size = 64, crop = "pad" }
"""
