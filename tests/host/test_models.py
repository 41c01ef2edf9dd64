"""Models: parity with timm, laws over the registry, the attention bias that is gathered once."""

import copy

import pytest
import torch
from torch import nn

from host.errors import ModelError
from host.models.efficientformer import EfficientFormer
from host.models.registry import ModelEntry, create_model, list_models

L1 = {"image_size": 224, "widths": (48, 96, 224, 448), "depths": (3, 2, 6, 4), "num_vit": 1, "tap_grids": (0, 0, 0, 1)}


def randomize(model: nn.Module) -> nn.Module:
    """Move biases, norms, scales and statistics off their zeros and ones, which would hide a swap."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("running_var", "gamma")) or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(0.75 + 0.2 * noise.sigmoid())
            else:
                tensor.copy_(noise * (0.3 if tensor.ndim == 1 else tensor[0].numel() ** -0.5))
    return model.eval()


def make_images(count: int = 4, size: int = 32, channels: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_model_runs_and_back_propagates(entry: ModelEntry, in_chans):
    model = create_model(entry.family, entry.variant, num_classes=5, in_chans=in_chans)
    images = make_images(8, entry.image_size, in_chans)
    features = model.forward_features(images)
    assert features.shape == (8, model.feature_dim)
    assert model(images).shape == (8, 5)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
def test_weights_depend_on_the_seed_alone(entry: ModelEntry):
    before = torch.random.get_rng_state()
    first, second, other = (
        create_model(entry.family, entry.variant, num_classes=5, in_chans=1, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_features_match_timm_efficientformer_l1():
    import timm

    reference = randomize(timm.create_model("efficientformer_l1", num_classes=10))
    ours = EfficientFormer(in_chans=3, num_classes=10, **L1)
    missing, unexpected = ours.load_state_dict(reference.state_dict(), strict=False)
    assert all(name.startswith("tap_norms.") for name in missing)  # ours; mean 0 and variance 1 here
    assert all(name.startswith("head_dist.") for name in unexpected)
    images = make_images(2, 224, 3)
    with torch.no_grad():
        expected = reference.forward_features(images).mean(dim=1)
        # tap_norms divide by sqrt(1 + 1e-5); the rest is float32 rounding through 15 blocks
        torch.testing.assert_close(ours.eval().forward_features(images), expected, rtol=1e-4, atol=1e-4)


def test_l1_has_the_parameters_of_the_papers_model():
    ours = EfficientFormer(in_chans=3, num_classes=1000, **L1)
    assert sum(p.numel() for p in ours.parameters()) == 11_840_928  # without the distillation head


def test_field_32_is_small_and_takes_features_at_two_depths():
    model = create_model("efficientformer", "field-32", num_classes=8, in_chans=1)
    assert sum(p.numel() for p in model.parameters()) == 359_104
    assert model.feature_dim == 40 * 2 * 2 + 96


def test_attention_bias_is_gathered_once_and_never_stale():
    model = randomize(create_model("efficientformer", "field-32", num_classes=8, in_chans=1))
    images = make_images()
    with torch.no_grad():
        exported = torch.export.export(model, (images,))
        gathers = {"aten.index.Tensor", "aten.gather.default", "aten.index_select.default"}
        assert not gathers & {str(node.target) for node in exported.graph.nodes}
        expected = model(images)
        loaded = create_model("efficientformer", "field-32", num_classes=8, in_chans=1, seed=9).eval()
        loaded.load_state_dict(model.state_dict())
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=0)
        model.stages[-1].blocks[-1].token_mixer.attention_biases += 1.0 * torch.arange(16)
        assert not torch.equal(model.train().eval()(images), expected)


def test_model_in_evaluation_mode_can_be_copied_and_differentiated_after_inference():
    model = create_model("efficientformer", "field-32", num_classes=8, in_chans=1).eval()
    with torch.inference_mode():
        model(make_images())
    copy.deepcopy(model)(make_images()).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 225}, "multiple of 32, got 225"),
        ({"num_vit": 0}, r"num_vit must be 1\.\.4"),
        ({"depths": (3, 2)}, "need 4 values"),
        ({"tap_grids": (0, 0, 3, 1)}, "must divide the stages' sizes"),
        ({"tap_grids": (0, 0, 0, 7)}, "must end in 0 or 1"),
    ],
)
def test_impossible_layouts_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        EfficientFormer(in_chans=3, num_classes=10, **(L1 | change))


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ModelError, match=r"no model vit/huge; choose one of cnn/small, efficientformer/field-32"):
        create_model("vit", "huge", num_classes=2, in_chans=1)
