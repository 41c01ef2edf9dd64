"""The same recipe on the same machine, twice, in two processes: identical weights, artifacts and bundle."""

import os
import subprocess
import sys

import pytest

RECIPE = """
name = "twice"
data = { source = "digits" }
model = { family = "efficientformer", variant = "field-32" }
train = { epochs = 6, augment_strength = 1.0, turned_share = 0.375 }
distill = { teacher = "train" }
teacher = { model = { family = "cnn", variant = "small" }, train = { epochs = 6, augment_strength = 1.0 } }
quantize = { max_accuracy_drop = 0.2 }
"""
FILES = (
    "train/model.safetensors",
    "train/teacher.safetensors",
    "quantize/model.float32.tflite",
    "quantize/model.int8.tflite",
    "export/model.infer.tflite",
    "export/twice-0.1.0.fieldvit",
)


@pytest.mark.slow
def test_two_runs_are_identical_byte_for_byte(tmp_path):
    recipe = tmp_path / "twice.toml"
    recipe.write_text(RECIPE)
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "host.cli", "run", str(recipe), "--runs", str(tmp_path / hash_seed)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    for name in FILES:
        first, second = (tmp_path / hash_seed / "twice" / name for hash_seed in ("1", "2"))
        assert first.read_bytes() == second.read_bytes(), name
