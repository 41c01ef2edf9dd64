"""From a recipe to a flashed board with one command: photos in folders, and a student of DeiT-LT."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import host
from device.contract.bundle import read_manifest
from device.contract.manifest import Manifest
from host.cli import main
from host.data.sources import data_folder, load_splits
from host.data.spec import DataSpec

CLASSES, IMAGES = (0, 25, 75), 100
LONG_TAIL = """
name = "long-tail"
data = { source = "digits", imbalance = 4 }
model = { family = "deit", variant = "field-32", options = { is_distilled = true, patch_size = 8 } }
distill = { method = "deit-lt" }
quantize = { max_accuracy_drop = 0.2 }

[train]
epochs = 40
learning_rate = 2e-3
reweight_share = 0.5

[teacher]
model = { family = "cnn", variant = "small" }
train = { epochs = 16, sam_radius = 0.1 }
"""


def run_and_flash(recipe: Path, folder: Path) -> Manifest:
    """What was put on the board."""
    places = [f"--{name}={folder / name}" for name in ("runs", "repo", "keys")]
    assert main(["run", str(recipe), "--flash", f"dir:{folder / 'board'}", *places]) == 0
    (bundle,) = (folder / "runs").glob("*/export/*.fieldvit")
    targets = [path.name for path in (folder / "board").rglob("*.fieldvit")]
    assert any(name.endswith(bundle.name) for name in targets), targets
    return read_manifest(bundle)


def write_photos(folder: Path) -> None:
    """Some classes of Tiny ImageNet as a user's pictures: a folder for each, JPEG files with names of their own."""
    if not (data_folder() / "tiny_imagenet100.npz").is_file():
        pytest.skip("tiny_imagenet100.npz is not in the data folder (FIELDVIT_DATA)")
    train = load_splits(DataSpec(source="tiny-imagenet100"), seed=0).train
    for label in CLASSES:
        (folder / f"kind-{label}").mkdir(parents=True)
        for index in np.flatnonzero(train.labels == label)[:IMAGES]:
            picture = Image.fromarray(train.images[int(index)])
            picture.save(folder / f"kind-{label}" / f"IMG_{index}.jpg", quality=95)


@pytest.mark.slow
def test_a_folder_of_photos_reaches_a_board(tmp_path):
    write_photos(tmp_path / "photos")
    recipe = tmp_path / "photos.toml"
    shutil.copy(Path(host.__file__).parent / "recipes" / "photos.toml", recipe)
    text = (
        recipe.read_text()
        .replace("epochs = 60", "epochs = 12")
        .replace("max_accuracy_drop = 0.02", "max_accuracy_drop = 0.2")
    )
    recipe.write_text(text)
    manifest = run_and_flash(recipe, tmp_path)
    assert manifest.labels == tuple(f"kind-{label}" for label in CLASSES)
    assert manifest.float_accuracy > 0.5  # it learned: guessing gives a third


@pytest.mark.slow
def test_a_student_of_deit_lt_reaches_a_board(tmp_path):
    recipe = tmp_path / "long-tail.toml"
    recipe.write_text(LONG_TAIL)
    manifest = run_and_flash(recipe, tmp_path)
    assert len(manifest.labels) == 10
    assert manifest.float_accuracy > 0.5
    assert min(artifact.argmax_agreement for artifact in manifest.artifacts) > 0.9
