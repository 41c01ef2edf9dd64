"""Folding batch norms: into the one layer that made what they read, or not at all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from bench.probes import make_images, randomize, relative_error
from host.errors import ModelError
from host.models.deploy import BatchNormAct2d, fold_batch_norms, inference_copy

WIDTH = 6


class Net(nn.Module):
    """Two layers and norms, which `connect` puts together: it takes the model and maps [B, C, H, W]."""

    image_size, in_chans = 8, WIDTH

    def __init__(self, connect: Callable[["Net", Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.connect = connect
        self.conv = layer or nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.other = nn.Conv2d(WIDTH, WIDTH, 1)
        self.other_norm = BatchNormAct2d(WIDTH)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.connect(self, images_nchw).flatten(1)


def norms_left(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def two_norms(net: Net, x: Tensor) -> Tensor:
    x = net.conv(x)
    return net.norm(x) + net.other_norm(x)


def a_sum(net: Net, x: Tensor) -> Tensor:
    x = net.conv(x)
    return net.norm(x) + x


def a_view(net: Net, x: Tensor) -> Tensor:
    x = net.conv(x)
    return net.norm(x) + x.flatten(2).mean(dim=2)[..., None, None]


def a_sum_behind_a_fresh_layer_scale(net: Net, x: Tensor) -> Tensor:
    return x + 1e-9 * a_sum(net, x)


def changed_in_place_before(net: Net, x: Tensor) -> Tensor:
    x = net.conv(x)
    net.act(x)
    return net.norm(x)


def changed_in_place_after(net: Net, x: Tensor) -> Tensor:
    x = net.conv(x)
    out = net.norm(x)
    return net.act(x) + out


def one_layer_twice(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(net.conv(x)))


def one_norm_twice(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + net.norm(net.other(x))


def something_else(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x).sin())


@pytest.mark.parametrize(
    "connect",
    [
        two_norms,
        a_sum,
        a_view,
        a_sum_behind_a_fresh_layer_scale,
        changed_in_place_before,
        changed_in_place_after,
        one_layer_twice,
        one_norm_twice,
        something_else,
    ],
)
def test_a_norm_stays_where_its_layer_has_another_reader_or_another_use(connect):
    model = randomize(Net(connect))
    expected, images = inference_copy(model), make_images(2, 8, WIDTH)
    fold_batch_norms(model)
    assert norms_left(model) == {"norm", "other_norm"}
    assert torch.equal(model(images), expected(images))


def test_a_norm_that_alone_reads_a_layer_goes_and_leaves_its_activation():
    model = randomize(Net(lambda net, x: net.act(net.norm(net.conv(x))) + net.other_norm(net.other(x)))).double()
    expected, images = inference_copy(model), make_images(2, 8, WIDTH).double()
    fold_batch_norms(model.train())
    assert not norms_left(model)
    assert isinstance(model.other_norm, nn.ReLU)
    assert not model.training
    with torch.no_grad():
        assert relative_error(model(images), expected(images)) < 1e-12


def test_random_numbers_are_left_alone():
    model = Net(lambda net, x: net.norm(net.conv(x)))
    before = torch.random.get_rng_state()
    fold_batch_norms(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_norms_without_statistics_stay():
    model = Net(lambda net, x: net.norm(net.conv(x)))
    model.norm = nn.BatchNorm2d(WIDTH, track_running_stats=False)
    fold_batch_norms(model)
    assert norms_left(model) == {"norm", "other_norm"}


def standardized(conv: nn.Conv2d) -> nn.Conv2d:
    from timm.layers import StdConv2d

    return StdConv2d(WIDTH, WIDTH, 3, padding=1)


def pruned(conv: nn.Conv2d) -> nn.Conv2d:
    return prune.l1_unstructured(conv, "weight", amount=0.5)


@pytest.mark.parametrize("change", [standardized, pruned, parametrizations.weight_norm])
def test_a_layer_that_makes_its_weights_anew_keeps_its_norm_even_in_a_faint_branch(change):
    model = Net(lambda net, x: x + 1e-3 * net.norm(net.conv(x)))
    model.conv = change(model.conv)
    images = make_images(2, 8, WIDTH)
    expected = randomize(model)(images)
    fold_batch_norms(model)
    assert "norm" in norms_left(model)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("num_tokens", [WIDTH, 3])
def test_a_norm_over_tokens_stays(num_tokens):
    """Of [B, N, D], BatchNorm1d normalizes N, and a linear layer makes D, even where both are of one size."""
    model = Net(lambda net, x: net.norm(net.conv(x.flatten(2)[:, :num_tokens, :WIDTH])), nn.Linear(WIDTH, WIDTH))
    model.norm, images = nn.BatchNorm1d(num_tokens), make_images(2, 8, WIDTH)
    expected = randomize(model)(images)
    fold_batch_norms(model)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("share", [1, 1e-3])
def test_a_norm_under_two_names_is_refused(share):
    model = randomize(Net(lambda net, x: x + share * net.twin(net.conv(x))))
    model.twin = model.norm
    with pytest.raises(ModelError, match=r"^Net: folding .* changes its outputs by \d.*, .* is \d.*: replace it first"):
        fold_batch_norms(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused(value):
    model = randomize(Net(lambda net, x: net.norm(net.conv(x))))
    model.conv.bias.data[0] = value
    with pytest.raises(
        ModelError, match=r"^Net: its outputs for a random image hold NaN or infinity, .*train it first"
    ):
        fold_batch_norms(model)


def test_outputs_that_are_no_longer_finite_are_refused():
    factors = iter((1.0, float("nan")))
    model = randomize(Net(lambda net, x: next(factors) * net.norm(net.conv(x))))
    with pytest.raises(ModelError, match="changes its outputs by nan"):
        fold_batch_norms(model)
