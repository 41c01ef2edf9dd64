"""Sizes and shapes of a model, counted without computing: on PyTorch's meta device, which holds no numbers.

MACs are those of convolutions and matrix products for one image, as the papers count them; norms, activations and
element-wise operations are left out. Attention that is fused into one operation is counted as its two products.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from host.models.entry import ModelEntry

_CONTAINERS = ("backbone", "stages", "blocks", "layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One line of a drawing: a module, what it is made of, what comes out of it."""

    name: str
    content: str
    output: tuple[int, ...]
    parameters: int
    macs: int


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int, in_chans: int) -> int:
    """Multiply-accumulate operations for one image; the model's own device is used, `meta` is the quickest."""
    return _trace(model, image_size, in_chans)["Global"]


def draw_stages(entry: ModelEntry) -> tuple[Stage, ...]:
    """The stages of a published model in their order, each with the shape that leaves it, without the batch axis."""
    with torch.device("meta"):
        model = entry.create().eval()
    names = dict(_stages(model))
    shapes: dict[str, tuple[int, ...]] = {}

    def note_shape(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            shapes[name] = _shape(output)

        return hook

    hooks = [module.register_forward_hook(note_shape(name)) for name, module in names.items()]
    try:
        macs = _trace(model, entry.image_size, entry.in_chans)
    finally:
        for hook in hooks:
            hook.remove()
    root = type(model).__name__
    return tuple(
        Stage(
            name=name,
            content=_content(module),
            output=shapes[name],
            parameters=count_parameters(module),
            macs=macs.get(f"{root}.{name}", 0),
        )
        for name, module in names.items()
        if name in shapes
    )


def _trace(model: nn.Module, image_size: int, in_chans: int) -> dict[str, int]:
    """MACs by module path; `Global` is the whole model."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _evaluating(model), _unfused(model), counter:
        model(torch.zeros(1, in_chans, image_size, image_size, device=device))
    return {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Counting must not move the statistics of batch norms."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Let timm's attention compute its two products one by one: the fused operation is not counted on every device."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _stages(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if name in _CONTAINERS and len(list(child.children())) > 1:
            yield from (
                _stages(child, f"{prefix}{name}.")
                if name == "backbone"
                else ((f"{prefix}{name}.{index}", part) for index, part in child.named_children())
            )
        else:
            yield f"{prefix}{name}", child


def _content(module: nn.Module) -> str:
    """`Linear`, or what the blocks of a stage are: `3 NextConvBlock, 1 NextTransformerBlock`."""
    blocks = getattr(module, "blocks", module if isinstance(module, nn.Sequential | nn.ModuleList) else None)
    if blocks is None or not len(blocks):
        return type(module).__name__
    return ", ".join(f"{count} {name}" for name, count in Counter(type(block).__name__ for block in blocks).items())


def _shape(output: Tensor | tuple[Tensor, ...]) -> tuple[int, ...]:
    tensor = output if isinstance(output, Tensor) else output[0]
    return tuple(tensor.shape[1:])
