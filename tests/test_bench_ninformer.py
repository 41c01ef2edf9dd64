"""Trainings of the table `ninformer_cifar10` go on where they were stopped."""

import pytest
import torch
from torch import nn

from bench.ninformer_cifar10 import Progress, train

SETTINGS = {"batch_size": 16, "augmented": True}


@pytest.fixture
def images():
    return torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def trained(images, path, *, stops) -> tuple[dict, Progress]:
    """The weights after the last of `stops` epochs, each reached by a process of its own."""
    for epochs in stops:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
        progress = Progress(path)
        train(model, images, torch.arange(40) % 10, SETTINGS | {"epochs": epochs}, progress, seed=0)
    return model.state_dict(), progress


def test_a_training_that_was_stopped_ends_with_the_same_weights(images, tmp_path):
    whole, _ = trained(images, tmp_path / "whole.pt", stops=[3])
    parts, progress = trained(images, tmp_path / "parts.pt", stops=[1, 3])
    assert progress.epochs == 3
    assert all(torch.equal(weights, parts[name]) for name, weights in whole.items())
    other, _ = trained(images, tmp_path / "other.pt", stops=[2])
    assert not all(torch.equal(weights, other[name]) for name, weights in whole.items())
