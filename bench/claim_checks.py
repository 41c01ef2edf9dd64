"""Check claims about architectures on the models themselves, with random weights, in seconds.

Sizes, inference forms, and what an output depends on. Each check returns what became of its claim.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.claim_findings import CHANGED, NOT_TESTABLE, Finding, judged
from bench.latency_families import convert, interleaved, runner
from bench.probes import make_images, randomize, relative_error, settle_norms
from bench.specified import PARAMETERS_AND_MACS, WITHOUT_TEACHER_HEAD, macs_error_allowed
from converters.quiet import quiet
from host.models.deploy import replace_modules
from host.models.efficientformer import MetaBlock1d, MetaBlock2d
from host.models.entry import ModelEntry
from host.models.measure import count_macs, count_parameters
from host.models.mobileformer import DynamicReLU, Former, MobileToFormer
from host.models.mobilevit import Attention, SeparableAttention, fold, unfold
from host.models.ninformer import NiNformer
from host.models.registry import find_model, list_models

MACS_384 = {"s": 17.216e9, "b": 24.586e9, "l": 31.957e9}


def entry_of(name: str) -> ModelEntry:
    return find_model(*name.split("/"))


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return entry_of(name).create(**options).eval()


def blocks_of(model: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


# --- sizes ------------------------------------------------------------------------------------------------------------


def check_sizes(*families: str, others: Callable[[], Mapping[str, tuple[float, float]]] = dict) -> Finding:
    """Parameters to the last one, MACs within 1 % or the specification's rounding; `others`: (counted, expected)."""
    wrong, errors = [], {}
    for name, (parameters, macs) in PARAMETERS_AND_MACS.items():
        entry = entry_of(name)
        if entry.family in families:
            model = on_meta(name)
            error = abs(count_macs(model, entry.image_size, entry.in_chans) / 1e6 - macs) if macs else 0.0
            errors[name] = error / macs if macs else 0.0
            if count_parameters(model) != parameters or (macs and error > macs_error_allowed(name, macs)):
                wrong.append(name)
    extra = others()
    wrong += [name for name, (counted, expected) in extra.items() if counted != expected]
    worst = max(errors, key=lambda name: errors[name])
    figure = (
        f"{len(errors) + len(extra) - len(wrong)} of {len(errors) + len(extra)} sizes agree; parameters are exact, MACs "
        f"at most {errors[worst]:.2%} off ({worst})"
    )
    return judged(not wrong, figure, ", ".join(wrong))


def one_head_sizes() -> dict[str, tuple[float, float]]:
    return {
        f"{name} with one head: {expected:,} parameters": (count_parameters(on_meta(name, distilled=False)), expected)
        for name, expected in WITHOUT_TEACHER_HEAD.items()
    }


def sizes_at_384() -> dict[str, tuple[float, float]]:
    counts = {v: count_macs(on_meta(f"nextvit/{v}", image_size=384), 384, 3) for v in MACS_384}
    return {
        f"{variant.upper()} at 384 pixels: {count / 1e9:.3f} G MACs": (round(count / 1e9, 3), MACS_384[variant] / 1e9)
        for variant, count in counts.items()
    }


def ninformer_sizes() -> dict[str, tuple[float, float]]:
    shared, _ = PARAMETERS_AND_MACS["ninformer/cifar10"]
    with torch.device("meta"):
        separate = count_parameters(NiNformer(num_classes=10, in_chans=3, shared_norm=False))
    growth = (separate - shared) / 4
    return {f"{growth:+.0f} parameters per block with separate norms": (growth, 512)}


# --- EfficientFormer --------------------------------------------------------------------------------------------------


def deploy_error(entry: ModelEntry) -> tuple[float, nn.Module]:
    """The inference form's relative error with random weights and statistics that no initialization has, and the form."""
    images = make_images(4, entry.image_size, entry.in_chans)
    options = {"drop_path": 0.0} if entry.family == "nextvit" else {}
    model = settle_norms(randomize(entry.create(**options)), images)
    deployed = model.deploy()
    with torch.no_grad():
        return relative_error(deployed(images[:2]), model(images[:2])), deployed


def check_efficientformer_deploy() -> Finding:
    errors, remaining = [], 0
    for entry in list_models():
        if entry.family == "efficientformer":
            error, deployed = deploy_error(entry)
            errors.append(error)
            remaining += sum(
                "Norm" in type(module).__name__
                for block in blocks_of(deployed, MetaBlock2d)
                for module in block.modules()
                if not list(module.children())  # a block's MLP is called ConvMlpWithNorm
            )
    figure = f"{max(errors):.1e} relative at most, {len(errors)} models; {remaining} norms left in their MB4D"
    return judged(max(errors) < 1e-4 and not remaining, figure)


def check_identity() -> Finding:
    worst, count = 0.0, 0
    generator = torch.Generator().manual_seed(0)
    for variant in ("l1", "l3", "l7"):
        for block in blocks_of(entry_of(f"efficientformer/{variant}").create().eval(), MetaBlock1d, MetaBlock2d):
            width = len(block.ls1.gamma)
            shape = (1, 49, width) if isinstance(block, MetaBlock1d) else (1, width, 14, 14)
            x = torch.randn(shape, generator=generator)
            with torch.no_grad():
                worst, count = max(worst, relative_error(block(x), x)), count + 1
    return judged(worst < 1e-3, f"{worst:.1e} relative at most, {count} untrained blocks")


class TokenHead(nn.Module):
    """The end of an EfficientFormer: tokens [1, N, C] to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean(dim=1))


class NhwcLayer(nn.Module):
    """A layer on maps, between maps with channels last, as the files hold them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def check_latency_table() -> Finding:
    """L1's latency as the sum over a table of its parts, each kind of part measured alone, in turn with the whole."""
    import litert_torch

    model = randomize(entry_of("efficientformer/l1").create()).deploy()
    layers: list[tuple[str, nn.Module, tuple[int, ...]]] = [("stem", NhwcLayer(model.stem), (1, 224, 224, 3))]
    width, size = 48, 56
    for index, stage in enumerate(model.stages):
        if index:
            layers.append((f"embedding {index}", NhwcLayer(stage.downsample), (1, size, size, width)))
            width, size = stage.blocks[0].mlp.fc1.in_channels, size // 2
        for block in blocks_of(stage, MetaBlock2d):
            layers.append((f"MB4D of {width}", NhwcLayer(block), (1, size, size, width)))
        for block in blocks_of(stage, MetaBlock1d):
            layers.append((f"MB3D of {width}", block, (1, size**2, width)))
    layers.append(("head", TokenHead(model), (1, size**2, width)))
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "whole.tflite"
        convert(model, 224, 3, whole)
        runners = {"whole": runner(whole)}
        for name, layer, shape in layers:
            if name not in runners:
                path = Path(directory) / f"{name}.tflite"
                with quiet():
                    litert_torch.convert(layer.eval(), (torch.zeros(shape),)).export(str(path))
                runners[name] = runner(path)
        times = interleaved(runners)
    total = sum(times[name] for name, _, _ in layers)
    return Finding(
        verdict=NOT_TESTABLE,
        figure=f"a part: L1 takes {times['whole']:.1f} ms in LiteRT, a table of its {len(times) - 1} kinds of parts sums "
        f"up to {total:.1f} ms, {total / times['whole'] - 1:+.0%} (target within 10 %)",
        why="needs the supernet and the slimming search, which this version does not have",
    )


# --- Next-ViT ---------------------------------------------------------------------------------------------------------


def check_nextvit_merge() -> Finding:
    errors = [deploy_error(entry)[0] for entry in list_models() if entry.family == "nextvit"]
    return judged(max(errors) < 1e-4, f"{max(errors):.1e} relative at most, {len(errors)} models")


class SquarePool(nn.Module):
    """The mean over s x s tokens of a square map, [B, C, N] to [B, C, M]."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[2] ** 0.5)
        return F.avg_pool2d(x.unflatten(2, (side, side)), self.ratio).flatten(2)


def check_square_pooling() -> Finding:
    images = make_images(2, 224)
    model = settle_norms(randomize(entry_of("nextvit/s").create(drop_path=0.0)), images)
    square, count = copy.deepcopy(model), 0
    for module in square.modules():
        if getattr(module, "sr_ratio", 1) > 1 and isinstance(getattr(module, "sr", None), nn.AvgPool1d):
            module.sr, count = SquarePool(module.sr_ratio), count + 1
    with torch.no_grad():
        change = relative_error(square(images), model(images))
    return judged(count > 0 and change > CHANGED, f"the logits of Next-ViT-S change by {change:.0%} of the largest")


# --- NiNformer --------------------------------------------------------------------------------------------------------


def check_permutation() -> Finding:
    model = randomize(entry_of("ninformer/cifar10").create())
    tokens = model.embed(make_images(2, 32))
    order = torch.randperm(model.num_tokens, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, permuted = (model.head(model.blocks(x).mean(dim=1)) for x in (tokens, tokens[:, order]))
    change = relative_error(permuted, logits)
    return judged(change > CHANGED, f"the logits change by {change:.0%} of the largest")


# --- MobileViT and Mobile-Former --------------------------------------------------------------------------------------


def check_folding() -> Finding:
    shapes = [(1, 3, 2, 2), (2, 5, 4, 6), (3, 8, 16, 2), (1, 144, 32, 32), (2, 64, 8, 8)]
    exact = 0
    for shape in shapes:
        maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        sequences = unfold(maps)
        both_ways = (
            torch.equal(fold(sequences, *shape[2:]), maps),
            torch.equal(unfold(fold(sequences, *shape[2:])), sequences),
        )
        exact += all(both_ways)
    return judged(exact == len(shapes), f"{exact} of {len(shapes)} shapes come back bit for bit, both ways")


@torch.no_grad()
def check_separable_attention() -> Finding:
    from timm.models.mobilevit import LinearSelfAttention

    attention = randomize(LinearSelfAttention(12)).double()
    norm = nn.GroupNorm(1, 12).double()
    maps = torch.randn(12, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = separable_attention_by_loops(attention, maps)
    ours = SeparableAttention(attention, norm)(unfold(maps[None]).reshape(1, 48, 12))
    error = relative_error(fold(ours.reshape(4, 12, 12), 6, 8)[0], expected)
    linear = _macs(attention, torch.empty(1, 12, 4, 256)) / _macs(attention, torch.empty(1, 12, 4, 64))
    quadratic = _products(1024) / _products(256)
    figure = f"{error:.0e} relative to a loop over pixels in float64; twice the side: {linear:g} times the MACs, v1's products {quadratic:g} times"
    return judged(error < 1e-10 and linear == 4 and quadratic == 16, figure)


def separable_attention_by_loops(attention: nn.Module, maps: Tensor) -> Tensor:
    """The paper's equations for one map [D, H, W], pixel by pixel."""
    dim, height, width = maps.shape
    weight, bias = attention.qkv_proj.weight.flatten(1), attention.qkv_proj.bias
    out = torch.empty_like(maps)
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        places = [(row, column) for row in range(top, height, 2) for column in range(left, width, 2)]
        projected = [weight @ maps[:, row, column] + bias for row, column in places]
        total = sum(p[0].exp() for p in projected)
        context = sum(p[0].exp() / total * p[1 : 1 + dim] for p in projected)
        for (row, column), p in zip(places, projected, strict=True):
            mixed = p[1 + dim :].clamp(min=0) * context
            out[:, row, column] = attention.out_proj.weight.flatten(1) @ mixed + attention.out_proj.bias
    return out


def _macs(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x.to(next(module.parameters())))
    return counter.get_total_flops() // 2


def _products(pixels: int) -> int:
    """MACs of v1's products without weights, in the first attention of XXS on a map of that many pixels."""
    with torch.device("meta"):
        model = entry_of("mobilevit/xxs").create().eval().deploy()
        attention = next(module for module in model.modules() if isinstance(module, Attention))
        with FlopCounterMode(display=False) as counter:
            attention(torch.empty(4, pixels // 4, attention.proj.in_features))
    return counter.get_flop_counts()["Global"][torch.ops.aten.bmm]


class CutBridge(nn.Module):
    """In the place of Mobile -> Former: the tokens as they were."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens


def check_bridges() -> Finding:
    least, leak, count = float("inf"), 0.0, 0
    for entry in list_models():
        if entry.family == "mobileformer":
            model, images = randomize(entry.create(num_classes=5)), make_images(2, entry.image_size)
            first, second = (slopes_and_tokens(model, image[None]) for image in images)
            least = min(least, *(relative_error(b, a) for a, b in zip(first, second, strict=True)))
            replace_modules(model, MobileToFormer, lambda bridge: CutBridge())
            first, second = (slopes_and_tokens(model, image[None]) for image in images)
            leak = max(leak, *(relative_error(b, a) for a, b in zip(first, second, strict=True)))
            count += 1
    figure = (
        f"between two images, slopes and token 0 differ by {least:.1%} of the largest or more with bridges, and by {leak:g} "
        f"with every bridge cut; {count} models"
    )
    return judged(leak == 0 and least > CHANGED, figure)


@torch.no_grad()
def slopes_and_tokens(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """All slopes of dynamic ReLUs, and token 0 after every block, for one image."""
    slopes, tokens, hooks = [], [], []
    for module in model.modules():
        if isinstance(module, DynamicReLU):
            hooks.append(module.register_forward_pre_hook(lambda act, inputs: slopes.extend(act.slopes(inputs[1]))))
        if isinstance(module, Former):
            hooks.append(module.register_forward_hook(lambda former, inputs, output: tokens.append(output[:, 0])))
    model(image)
    for hook in hooks:
        hook.remove()
    return torch.cat(slopes, dim=1), torch.cat(tokens, dim=1)
