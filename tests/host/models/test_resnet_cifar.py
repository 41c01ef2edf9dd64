"""The residual networks for 32-pixel images: sizes, shortcuts, the normalized classifier and the inference form."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.probes import make_images, randomize, relative_error, settle_norms
from host.errors import ModelError
from host.models.measure import count_macs, count_parameters
from host.models.resnet_cifar import ENTRIES, ResNet, Subsample
from tests.support.models import ranks_and_operations

PUBLISHED_MILLIONS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}  # He et al. 2016, table 6

both_classifiers = pytest.mark.parametrize("is_normalized", [False, True], ids=["linear", "normalized"])


def small(**options: object) -> ResNet:
    torch.manual_seed(0)
    return ResNet(**{"num_classes": 5, "in_chans": 3, "depth": 8, **options})


@pytest.mark.parametrize(("depth", "millions"), PUBLISHED_MILLIONS.items())
def test_sizes_are_the_published_ones(depth, millions):
    with torch.device("meta"):
        parameters = count_parameters(ResNet(num_classes=10, in_chans=3, depth=depth))
    assert round(parameters / 1e6, 2 if millions < 1 else 1) == millions


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entries_count_exactly(entry):
    with torch.device("meta"):
        model = entry.create().eval()
    assert (count_parameters(model), count_macs(model, 32, 3)) == (entry.parameters, entry.macs)


def test_shortcuts_as_convolutions_cost_what_the_docstring_says():
    entry = next(entry for entry in ENTRIES if entry.variant == "32")
    with torch.device("meta"):
        deployed = entry.create().eval().deploy()
    assert count_macs(deployed, 32, 3) - entry.macs == 262_144 == pytest.approx(0.0038 * entry.macs, rel=0.01)


class Reference(nn.Module):
    """The network from torchvision's blocks, with the shortcut written out pixel by pixel."""

    def __init__(self) -> None:
        from torchvision.models.resnet import BasicBlock  # `host.models` repairs torchvision first

        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, stride=2, downsample=_OptionA()), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, stride=2, downsample=_OptionA()), BasicBlock(64, 64))
        self.head = nn.Linear(64, 5)

    def forward(self, images):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(images)).relu())))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class _OptionA(nn.Module):
    def forward(self, x):
        batch, channels, height, width = x.shape
        out = x.new_zeros(batch, 2 * channels, height // 2, width // 2)
        for row in range(height // 2):
            for column in range(width // 2):
                out[:, channels // 2 : channels // 2 + channels, row, column] = x[:, :, 2 * row, 2 * column]
        return out


def test_it_is_torchvision_s_network_with_the_other_shortcut():
    ours = randomize(small(depth=14)).double()
    reference = Reference().double().eval()
    reference.load_state_dict(ours.state_dict())
    images = make_images(2, 32).double()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), reference(images))


def test_subsampling_as_a_convolution_is_the_same_to_the_bit():
    x = make_images(2, 8, 16)
    assert torch.equal(Subsample(16).as_convolution()(x), Subsample(16)(x))


def test_normalized_classifier_gives_cosines_whatever_the_lengths():
    model = small(is_normalized=True).eval()
    images = make_images(4, 32)
    with torch.no_grad():
        features, logits = model.forward_features(images), model(images)
        model.head.weight.mul_(torch.tensor([0.5, 1, 2, 10, 100])[:, None])
        torch.testing.assert_close(model(images), logits)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    expected = F.cosine_similarity(features[:, None], model.head.weight[None], dim=2)
    torch.testing.assert_close(logits, expected)


@both_classifiers
def test_all_weights_get_gradients(is_normalized):
    model = small(in_chans=1, is_normalized=is_normalized)
    model(make_images(4, 32, 1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@both_classifiers
def test_inference_form_equals_the_model(is_normalized):
    model = randomize(small(depth=14, is_normalized=is_normalized)).double()
    images = make_images(2, 32).double()
    deployed = model.deploy()
    with torch.no_grad():
        assert relative_error(deployed(images), model(images)) <= 1e-9
        assert relative_error(deployed.forward_features(images), model.forward_features(images)) <= 1e-9
        assert torch.equal(deployed.deploy()(images), deployed(images))


@both_classifiers
def test_inference_form_has_one_linear_head_and_folded_norms(is_normalized):
    images = make_images(2, 32)
    deployed = settle_norms(small(is_normalized=is_normalized), images).deploy()
    kinds = {type(module) for module in deployed.modules()}
    assert not kinds & {nn.BatchNorm2d, Subsample}
    assert isinstance(deployed.head, nn.Linear)
    assert (deployed.head.in_features, deployed.head.out_features) == (64, 5)
    assert not any(module.training for module in deployed.modules())
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    ranks, operations = ranks_and_operations(deployed, images[:1])
    assert max(ranks) <= 4
    assert not operations & {"aten.slice.Tensor", "aten.index.Tensor", "aten.gather.default"}


@pytest.mark.parametrize("depth", [2, 18, 33])
def test_other_depths_are_refused(depth):
    with pytest.raises(ModelError, match=rf"depth must be 6 n \+ 2, .*got {depth}"):
        ResNet(num_classes=10, in_chans=3, depth=depth)


def test_images_of_another_size_are_refused():
    with pytest.raises(ModelError, match="takes images"):
        small()(make_images(1, 64))
