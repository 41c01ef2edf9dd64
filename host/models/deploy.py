"""Parts of `deploy()`: the inference form of a model, with the same weights and the same outputs.

Every model has `deploy()`, which returns a changed copy in evaluation mode and leaves the model itself alone. What all
of them need is here; what only one family needs is beside that family.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from host.errors import ModelError

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
_LAYERS = {nn.Conv2d: 4, nn.Linear: 2}
"""What norms are folded into, and how many axes its output must have for the second one to be its channels."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
TOLERANCE = 1e-4
"""How far folding may move the outputs, as a share of the largest one; float32 rounds deep models less than that."""


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
def fold_batch_norms(model: nn.Module) -> None:
    """Fold batch norms into the convolutions and linear layers before them, in place; in evaluation mode afterwards.

    A norm is folded if it runs once, on the output of a layer that runs once, and no other operation reads that output.
    The layer must be a plain one: a subclass may do more than its weights say, and a linear layer on tokens [B, N, D]
    has its channels last, where the norm has N. One pass over a random image finds out, and a second one compares the
    model's outputs.

    Args:
        model: has `image_size` and `in_chans`.

    Raises:
        ModelError: the outputs have changed, or are not finite, so that nothing can be compared.
    """
    images = _draw_image(model.eval())
    pairs, expected = _find_pairs(model, images)
    for producer, norm in pairs:
        layer, batch_norm = model.get_submodule(producer), model.get_submodule(norm)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        set_module(model, producer, fuse(layer, batch_norm))
        set_module(model, norm, _what_remains(batch_norm))
    if pairs and not expected.is_meta:  # which holds no numbers
        _require_equal(model, model(images), expected)


def _draw_image(model: nn.Module) -> Tensor:
    """One random image, the same each time."""
    shape = (1, model.in_chans, model.image_size, model.image_size)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return image.to(next(model.parameters()))


def _what_remains(norm: nn.Module) -> nn.Module:
    """The activation of a norm that has one, such as timm's."""
    return norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity().eval()


def _require_equal(model: nn.Module, outputs: Tensor, expected: Tensor) -> None:
    name = type(model).__name__
    if not expected.isfinite().all():
        raise ModelError(
            f"{name}: its outputs for a random image hold NaN or infinity, so that folding its batch norms cannot be "
            "checked; train it first, or take an earlier save"
        )
    error, largest = (float(values.abs().max()) for values in (outputs - expected, expected))
    if not error <= TOLERANCE * largest:  # NaN fails, too
        raise ModelError(
            f"{name}: folding its batch norms changes its outputs by {error:.1e}, and the largest one is "
            f"{largest:.1e}; a layer or norm is used in a way that one pass does not show: replace it first"
        )


def _find_pairs(model: nn.Module, images_nchw: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """(layer, norm) by name, for each norm that can be folded; and the model's outputs."""
    counter = _ReadCounter()
    made: dict[str, list[Tensor]] = defaultdict(list)  # while these live, no other tensor has their identity
    taken: dict[str, list[Tensor]] = defaultdict(list)
    hooks = []

    def note_output(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made[name].append(output)
        counter.reads[id(output)] = 0

    def note_input(name: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken[name].extend(inputs)

    for name, module in model.named_modules():
        if _is_plain(module):
            hooks.append(module.register_forward_hook(partial(note_output, name)))
        elif type(module) in _NORMS and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(partial(note_input, name)))
    try:
        with counter:
            logits = model(images_nchw)
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: outputs[0] for name, outputs in made.items() if len(outputs) == 1}
    producers = {id(x): name for name, x in once.items() if x.ndim == _LAYERS[type(model.get_submodule(name))]}
    readers = {name: id(inputs[0]) for name, inputs in taken.items() if len(inputs) == 1}
    pairs = [(producers[x], name) for name, x in readers.items() if x in producers and counter.reads[x] == 1]
    return pairs, logits


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a layer that does what its weights say: no subclass, and no hook that makes them anew."""
    return type(module) in _LAYERS and not module._forward_pre_hooks


class _ReadCounter(TorchDispatchMode):
    """Counts, while it is entered, the operations that read a tensor.

    Attributes:
        reads: by the identity of each tensor to watch, which must stay alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self.reads:
                self.reads[id(value)] += 1
        return operation(*args, **(kwargs or {}))
