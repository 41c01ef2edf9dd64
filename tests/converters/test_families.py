"""Every family through both converters: a small variant by default, a full-size one in the slow tier."""

from pathlib import Path

import numpy as np
import pytest
import torch

from converters import coreml, gates, tflite
from converters.mil import MilProgram
from converters.parity import compare
from device.engine import Engine
from host.models.entry import ModelEntry
from host.models.registry import find_model
from tests.support.models import photos, randomize, settle_norms

SMALL = (
    "efficientformer/field-32",
    "efficientformerv2/field-64",
    "nextvit/field-64",
    "ninformer/field-32",
    "mobilevit/field-64",
    "mobilevitv2/field-64",
    "mobileformer/field-64",
    "deit/field-32",
    "gcab/field-32",
)
FULL_SIZE = (
    "efficientformer/l1",
    "efficientformerv2/s0",
    "nextvit/s",
    "ninformer/cifar10",
    "mobilevit/s",
    "mobilevitv2/100",
    "mobileformer/294m",
    "deit/tiny-distilled",
    "gcab/cifar",
)
MIN_COSINE = 0.9999
NUM_CLASSES = 10
both_sizes = pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FULL_SIZE)]
)


def reference(name: str) -> tuple[ModelEntry, torch.nn.Module, np.ndarray, np.ndarray]:
    """Entry, model in its training form with weights that hide nothing, photographs [N, H, W, C], its logits [N, K]."""
    entry = find_model(*name.split("/"))
    images = photos(entry.image_size, entry.in_chans, count=4)
    images_nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    model = settle_norms(randomize(entry.create(num_classes=NUM_CLASSES)), images_nchw)
    with torch.no_grad():
        return entry, model, images, model(images_nchw).numpy()


@both_sizes
def test_tflite_float32_follows_the_model(name, tmp_path: Path):
    entry, model, images, logits = reference(name)
    deployed, path = model.deploy(), tmp_path / "model.tflite"
    tflite.convert_float(deployed, (1, entry.image_size, entry.image_size, entry.in_chans), NUM_CLASSES, path)
    gates.assert_builtin_ops(path)
    assert gates.partitions(path)[0] <= 1 + MORE_PARTITIONS.get(name, 0)
    engine = Engine(path)
    features = np.stack([engine.features(image[None]) for image in images])
    outputs = deployed.head(torch.from_numpy(features)).detach().numpy()
    assert compare(logits, outputs).min_cosine >= MIN_COSINE


@both_sizes
def test_coreml_follows_the_model(name, tmp_path: Path):
    entry, model, images, logits = reference(name)
    shape = (1, entry.image_size, entry.image_size, entry.in_chans)
    path = coreml.convert(
        model.deploy(),
        shape,
        tmp_path / "model.mlpackage",
        input_spec_metadata={},
        labels=[str(label) for label in range(NUM_CLASSES)],
    )
    program = MilProgram(path, round_to_half=True)
    outputs = np.concatenate([program.run({"images": image[None]})["logits"] for image in images])
    assert compare(logits, outputs).min_cosine >= MIN_COSINE


MORE_PARTITIONS: dict[str, int] = {}
"""What XNNPACK splits beyond one partition, with the operation that does it."""
