"""Parts of `deploy()`: the inference form of a model, with the same weights and the same outputs.

Every model has `deploy()`, which returns a changed copy in evaluation mode and leaves the model itself alone. What all
of them need is here; what only one family needs is beside that family.
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
_COMPUTE = (nn.Conv2d, nn.Linear)


def inference_copy(model: Model) -> Model:
    """A copy in evaluation mode without gradients."""
    for module in model.modules():
        if cached := getattr(module, "attention_bias_cache", None):
            cached.clear()  # timm's attention keeps tensors there that hold a gradient, which cannot be copied
    return copy.deepcopy(model).eval().requires_grad_(False)


def replace_modules(model: nn.Module, kind: type[nn.Module], make: Callable[..., nn.Module]) -> None:
    """Put `make(module)` in the place of every module that is a `kind`, below `model`."""
    for name, module in list(model.named_modules()):
        if name and isinstance(module, kind):
            set_module(model, name, make(module))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name`, a dotted path."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def make_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer that holds copies of `weight` [O, I] and `bias` [O], without gradients; draws nothing."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


@torch.no_grad()
def absorb_affine(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """A copy of a linear layer or 1 x 1 convolution that does what `scale` and `shift` [I] before it did.

    W diag(scale) and b + W shift, computed in float64; the copy has a bias in any case.
    """
    matrix = layer.weight.double().flatten(1)  # [O, I]
    bias = matrix @ shift.double() + (0 if layer.bias is None else layer.bias.double())
    absorbed = copy.deepcopy(layer)
    absorbed.weight.copy_((matrix * scale.double()).reshape(layer.weight.shape))
    absorbed.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)
    return absorbed


@torch.no_grad()
def fold_batch_norms(model: nn.Module, images_nchw: Tensor) -> None:
    """Fold every batch norm that reads the output of a convolution or linear layer into that layer.

    One pass over `images_nchw` finds which layer that is. A norm that reads anything else, or a layer's output that
    several norms read, stays.
    """
    for producer, norm in _find_pairs(model, images_nchw):
        layer, batch_norm = model.get_submodule(producer), model.get_submodule(norm)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        set_module(model, producer, fuse(layer, batch_norm))
        set_module(model, norm, _what_remains(batch_norm))


def _what_remains(norm: nn.Module) -> nn.Module:
    """The activation of a norm that has one, such as timm's."""
    return norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _find_pairs(model: nn.Module, images_nchw: Tensor) -> list[tuple[str, str]]:
    """(layer, norm) by name, for each norm whose input is that layer's output."""
    producers: dict[int, str] = {}
    kept: list[Tensor] = []  # while these live, no other tensor has their identity
    readers: dict[str, list[str]] = {}
    hooks = []

    def note_producer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            producers[id(output)] = name
            kept.append(output)

        return hook

    def note_reader(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in producers:
                readers.setdefault(producers[id(inputs[0])], []).append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, _COMPUTE):
            hooks.append(module.register_forward_hook(note_producer(name)))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(note_reader(name)))
    try:
        model(images_nchw)
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer, norms[0]) for layer, norms in readers.items() if len(norms) == 1]
