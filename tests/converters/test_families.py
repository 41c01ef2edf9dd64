"""Every family through both converters, a small variant and a full-size one.

By default only what takes a few seconds: small variants of all families but one in Core ML, of two in TFLite.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.family_parity import (
    FULL_SIZE,
    SMALL,
    convert_coreml,
    convert_tflite,
    coreml_logits,
    reference,
    tflite_logits,
)
from bench.probes import digits
from converters import gates
from converters.parity import compare
from host.models.entry import ModelEntry
from host.models.registry import find_model, list_models

MIN_COSINE = 0.9999
MIN_HALF_COSINE = {
    "mobilevitv2/field-64": 0.998,
    "mobilevitv2/100": 0.998,
    "mobileformer/field-64": 0.998,
    "mobileformer/294m": 0.99,
}
"""In float16, random weights of these families amplify every rounding, that of the weights first of all; the last test
shows that trained ones do not."""
TRAINED_IN_HALF = ("mobilevitv2/field-32", "mobileformer/field-32")

QUICK_IN_TFLITE = ("efficientformer/field-32", "ninformer/field-32")
QUICK_IN_COREML = ("efficientformer/field-32", "nextvit/field-64", "deit/field-32", "gcab/field-32")


def both_sizes(*quick: str) -> pytest.MarkDecorator:
    """All names, of which only the quick ones are tested by default."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in (*SMALL, *FULL_SIZE)]
    return pytest.mark.parametrize("name", names)


def test_both_sizes_of_every_family_are_here():
    families = {entry.family for entry in list_models()} - {"cnn", "resnet-cifar"}  # which only teach
    for names, is_exact in ((SMALL, False), (FULL_SIZE, True)):
        entries = [find_model(*name.split("/")) for name in names]
        assert {entry.family for entry in entries} == families
        assert all(entry.is_exact == is_exact for entry in entries)


@both_sizes(*QUICK_IN_TFLITE)
def test_tflite_float32_follows_the_model(name, tmp_path: Path):
    entry = find_model(*name.split("/"))
    model, images, logits = reference(entry)
    deployed = model.deploy()
    path = convert_tflite(deployed, entry, tmp_path)
    assert gates.partitions(path) == (1, {})
    assert compare(logits, tflite_logits(path, deployed, images)).min_cosine >= MIN_COSINE


@both_sizes(*QUICK_IN_COREML)
def test_coreml_float16_follows_the_model(name, tmp_path: Path):
    entry = find_model(*name.split("/"))
    model, images, logits = reference(entry)
    package = convert_coreml(model.deploy(), entry, tmp_path, is_half=True)
    assert compare(logits, coreml_logits(package, images)).min_cosine >= MIN_HALF_COSINE.get(name, MIN_COSINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", MIN_HALF_COSINE
)  # the others' float16 program, the same but for its casts, is held to it
def test_coreml_float32_follows_the_model(name, tmp_path: Path):
    entry = find_model(*name.split("/"))
    model, images, logits = reference(entry)
    package = convert_coreml(model.deploy(), entry, tmp_path, is_half=False)
    assert compare(logits, coreml_logits(package, images)).min_cosine >= MIN_COSINE


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_IN_HALF)
def test_coreml_float16_follows_what_was_trained_on_digits(name, tmp_path: Path):
    entry = replace(find_model(*name.split("/")), num_classes=10, in_chans=1)
    images, labels = digits()
    images = F.interpolate(images, size=entry.image_size, mode="bilinear")
    model = trained(entry, images[:1500], labels[:1500])
    with torch.no_grad():
        logits = model(images[1500:])
    assert (logits.argmax(dim=1) == labels[1500:]).float().mean() >= 0.8
    package = convert_coreml(model.deploy(), entry, tmp_path, is_half=True)
    outputs = coreml_logits(package, images[1500:1532].permute(0, 2, 3, 1).numpy())
    assert compare(logits[:32].numpy(), outputs).min_cosine >= MIN_COSINE


def trained(entry: ModelEntry, images: torch.Tensor, labels: torch.Tensor, *, steps: int = 100) -> nn.Module:
    """A model after some steps of 32 images, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = entry.create().train()
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            batch = torch.randint(len(images), (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
