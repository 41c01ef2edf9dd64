"""Every model that timm has: the same names, shapes and outputs, head by head, before and after `deploy`."""

import pytest
import torch
from torch import Tensor, nn

from bench.probes import make_images, randomize, relative_error, settle_norms
from host.models.entry import ModelEntry
from host.models.heads import DistillationHeads
from host.models.registry import list_models

IN_TIMM = [entry for entry in list_models() if entry.timm_name]
DEFAULT = {
    "efficientformer/l1": {},
    "efficientformerv2/s0": {},
    "nextvit/s": {"image_size": 64},
    "mobilevit/xxs": {},
    "mobilevitv2/050": {},
    "deit/tiny-distilled": {},
}
"""One model per family, with options that make it quicker; all others are in the slow tier."""


@pytest.mark.parametrize(
    ("entry", "options"),
    [
        pytest.param(e, DEFAULT.get(e.name, {}), id=e.name, marks=() if e.name in DEFAULT else pytest.mark.slow)
        for e in IN_TIMM
    ],
)
@torch.no_grad()
def test_outputs_are_timms(entry: ModelEntry, options: dict):
    import timm

    ours = entry.create(num_classes=10, **options).eval()
    images = make_images(4, ours.image_size)
    reference = settle_norms(randomize(timm.create_model(entry.timm_name, num_classes=10)), images)
    ours.load_state_dict(entry.from_timm(reference.state_dict()))  # fails where a name or shape differs
    single, deployed_single, timms_single = ours(images), ours.deploy()(images), reference(images)
    expected, images = reference.double()(images.double()), images.double()
    assert rounding(single, expected) <= 2 * rounding(timms_single, expected)
    assert rounding(deployed_single, expected) <= 2 * rounding(timms_single, expected)
    assert relative_error(ours.double()(images), expected) <= 1e-10
    assert relative_error(ours.deploy()(images), expected) <= 1e-10
    if isinstance(ours.head, DistillationHeads):
        heads = ours.head.separate(ours.forward_features(images))
        for logits, timms in zip(heads, separate_by_timm(reference, images), strict=True):
            assert relative_error(logits, timms) <= 1e-10


def rounding(logits: Tensor, expected: Tensor) -> float:
    """The length of the error over all images: what rounding does to one number may happen to be next to nothing."""
    return float((logits - expected).norm() / expected.norm())


def separate_by_timm(reference: nn.Module, images_nchw: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the head for labels and of the head for a teacher, which timm gives in training alone."""
    reference.set_distilled_training()
    reference.training = True  # of the whole and not of its parts, whose norms keep their statistics
    return reference(images_nchw)
