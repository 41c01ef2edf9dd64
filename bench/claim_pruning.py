"""Check NViT's claims about its score and its masks: units of a small vision transformer set to zero, one or many.

Yang et al. 2023, arXiv:2110.04869. A unit is what NViT removes: one channel of the tokens (EMB), one head (H), one index
of queries and keys (QK) or of values (V) in all heads, one hidden unit of an MLP. The score is the paper's Eq. 6, without
the divisors of the authors' code, which it does not explain.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.claim_findings import NUM_SEEDS, Finding, judged
from bench.probes import digits, make_images, randomize, relative_error
from host.models.deit import VisionTransformer
from host.models.deploy import replace_modules
from host.models.vit_widths import BlockWidths, uniform_widths

EMBED_DIM = 56
"""Of the models here; no other axis of their tensors is that long."""
CLEARLY_POSITIVE = 0.5
"""NViT 1: least rank correlation, with every seed. The paper states no figure."""
DEPTH, NUM_HEADS, HEAD_DIM, MLP_DIM = 4, 4, 12, 96
STEPS, BATCH_SIZE, LEARNING_RATE = 400, 64, 3e-3
NUM_IMAGES = 256
"""On which scores and losses are measured; the model has been trained on them, as in the paper."""
MLP_STEP = 8
"""Every eighth hidden unit is measured: they are most of all units, and alike."""

Cut = tuple[str, int, Tensor]
"""A parameter's name, an axis of it, and indices on that axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What a mask sets to zero, and the entries that its score counts."""

    kind: str
    zeroed: Sequence[Cut]
    scored: Sequence[Cut]


# --- 1: the score -----------------------------------------------------------------------------------------------------


def check_score() -> Finding:
    """Rank correlation of score and increase of the loss, over units of all kinds together."""
    correlations, increases = [], {}
    for seed in range(NUM_SEEDS):
        model, images, labels = train_on_digits(seed)
        units = [*list_units(model)]
        found = loss_increases(model, units, images[:NUM_IMAGES], labels[:NUM_IMAGES])
        correlations.append(rank_correlation(scores(model, units, images[:NUM_IMAGES], labels[:NUM_IMAGES]), found))
        for kind in dict.fromkeys(unit.kind for unit in units):
            of_kind = [value for unit, value in zip(units, found.tolist(), strict=True) if unit.kind == kind]
            increases.setdefault(kind, []).append(float(np.median(of_kind)))
    figure = (
        f"rank correlation {', '.join(f'{value:.2f}' for value in correlations)} (seeds 0 to {NUM_SEEDS - 1}; at least "
        f"{CLEARLY_POSITIVE}) over {len(units)} units; median increase of the loss "
        + ", ".join(f"{kind} {mean(values):.1e}" for kind, values in increases.items())
    )
    return judged(min(correlations) >= CLEARLY_POSITIVE, figure, "the correlation is lower with some seed")


def train_on_digits(seed: int) -> tuple[VisionTransformer, Tensor, Tensor]:
    """A small vision transformer after `STEPS` steps, and the images and labels it was trained on."""
    images, labels = (values[:1500] for values in digits())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer(
            embed_dim=EMBED_DIM,
            widths=uniform_widths(DEPTH, NUM_HEADS, HEAD_DIM, MLP_DIM),
            num_classes=10,
            in_chans=1,
            image_size=8,
            patch_size=2,
            softmax_scale=HEAD_DIM**-0.5,
        )
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
        for _ in range(STEPS):
            batch = torch.randint(len(images), (BATCH_SIZE,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval(), images, labels


def list_units(model: VisionTransformer) -> Iterator[Unit]:
    """All units of a model whose widths no pruning has changed, but only some of its MLPs'."""
    for channel in range(EMBED_DIM):
        zeroed = [
            (name, axis, torch.tensor([channel]))
            for name, parameter in model.named_parameters()
            for axis, size in enumerate(parameter.shape)
            if size == EMBED_DIM
        ]
        scored = [cut for cut in zeroed if cut[0].startswith(("patch_embed.proj", "blocks")) and _is_matrix(cut[0])]
        yield Unit(kind="EMB", zeroed=zeroed, scored=scored)
    for index, widths in enumerate(model.widths):
        yield from _attention_units(f"blocks.{index}.attn", widths)
        yield from _mlp_units(f"blocks.{index}.mlp", widths)


def _attention_units(name: str, widths: BlockWidths) -> Iterator[Unit]:
    rows = torch.arange(sum(widths.qkv_dims)).view(3, widths.num_heads, widths.qk_dim)
    columns = torch.arange(widths.qkv_dims[2]).view(widths.num_heads, widths.v_dim)
    for head in range(widths.num_heads):
        scored = _rows(f"{name}.qkv", rows[:, head].flatten())
        yield Unit(kind="H", zeroed=[*scored, (f"{name}.proj.weight", 1, columns[head])], scored=scored)
    for i in range(widths.qk_dim):
        q, k, v = rows[:, :, i]
        yield Unit(kind="QK", zeroed=_rows(f"{name}.qkv", torch.cat([q, k])), scored=_rows(f"{name}.qkv", q))
        scored = _rows(f"{name}.qkv", v)
        yield Unit(kind="V", zeroed=[*scored, (f"{name}.proj.weight", 1, columns[:, i])], scored=scored)


def _mlp_units(name: str, widths: BlockWidths) -> Iterator[Unit]:
    for i in range(0, widths.mlp_dim, MLP_STEP):
        scored = _rows(f"{name}.fc1", torch.tensor([i]))
        yield Unit(kind="MLP", zeroed=[*scored, (f"{name}.fc2.weight", 1, torch.tensor([i]))], scored=scored)


def _rows(name: str, indices: Tensor) -> list[Cut]:
    return [(f"{name}.weight", 0, indices), (f"{name}.bias", 0, indices)]


def _is_matrix(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name


def scores(model: nn.Module, units: Sequence[Unit], images: Tensor, labels: Tensor) -> Tensor:
    """Eq. 6 of each unit, the square of the sum of gradient times weight, averaged over batches."""
    total, parameters = torch.zeros(len(units)), dict(model.named_parameters())
    batches = [*zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)]
    for x, y in batches:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), [*parameters.values()])
        products = {name: g * w.detach() for (name, w), g in zip(parameters.items(), gradients, strict=True)}
        sums = [
            sum(products[name].index_select(axis, indices).sum() for name, axis, indices in unit.scored)
            for unit in units
        ]
        total += torch.stack(sums).square()
    return total / len(batches)


@torch.no_grad()
def loss_increases(model: nn.Module, units: Sequence[Unit], images: Tensor, labels: Tensor) -> Tensor:
    """How much the loss rises when each unit alone is set to zero."""

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    parameters, before, increases = dict(model.named_parameters()), loss(), []
    for unit in units:
        kept = {name: parameters[name].clone() for name, _, _ in unit.zeroed}
        for name, axis, indices in unit.zeroed:
            parameters[name].index_fill_(axis, indices, 0)
        increases.append(loss() - before)
        for name, weight in kept.items():
            parameters[name].copy_(weight)
    return torch.stack(increases)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; there are no ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# --- 5: the dense model -----------------------------------------------------------------------------------------------


class KeptNorm(nn.Module):
    """A LayerNorm whose mean and deviation are those of the kept channels; the others stay zero."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight[self.kept], self.norm.bias[self.kept]
        normed = F.layer_norm(x[..., self.kept], weight.shape, weight, bias, self.norm.eps)
        return torch.zeros_like(x).index_copy(-1, self.kept, normed)


@torch.no_grad()
def check_dense_model() -> Finding:
    images = make_images(4, 32).double()
    wide = randomize(_small_vit(EMBED_DIM, uniform_widths(2, 4, 16, 64))).double()
    inner_wide, emb_wide = copy.deepcopy(wide), wide
    inner = relative_error(prune_inner_widths(inner_wide)(images), inner_wide(images))
    outputs = prune_embedding(emb_wide)(images)
    emb = relative_error(outputs, emb_wide(images))
    replace_modules(emb_wide, nn.LayerNorm, lambda norm: KeptNorm(norm, _kept_channels()))
    mended = relative_error(outputs, emb_wide(images))
    figure = (
        f"H, QK, V and MLP: {inner:.0e} relative; EMB, 56 to 48 channels: {emb:.0%}, or {mended:.0e} if the masked model's "
        "LayerNorms leave out the masked channels; all in float64"
    )
    why = "a LayerNorm counts the channels that EMB's mask sets to zero; every other mask is exact. The conversion is ours"
    return judged(max(inner, emb) < 1e-5, figure, why)


def _small_vit(embed_dim: int, widths: Sequence[BlockWidths]) -> VisionTransformer:
    options = {"num_classes": 5, "in_chans": 3, "image_size": 32, "patch_size": 8, "is_distilled": True}
    return VisionTransformer(embed_dim=embed_dim, widths=widths, **options).double().eval()


def _kept_channels() -> Tensor:
    return torch.tensor([channel for channel in range(EMBED_DIM) if channel % 7])


def prune_inner_widths(wide: VisionTransformer) -> VisionTransformer:
    """A narrow copy of blocks of 4 heads of 16 and an MLP of 64; what it lacks is set to zero in `wide`."""
    heads, qk, v, hidden = torch.tensor([0, 2, 3]), torch.arange(1, 9), torch.tensor([0, 3, 7, 15]), torch.arange(8, 40)
    widths = BlockWidths(num_heads=len(heads), qk_dim=len(qk), v_dim=len(v), mlp_dim=len(hidden))
    narrow = _small_vit(EMBED_DIM, [widths] * len(wide.blocks))
    rows = torch.arange(3 * 4 * 16).view(3, 4, 16)[:, heads]
    values = rows[2][:, v].flatten()
    qkv = torch.cat([rows[0][:, qk].flatten(), rows[1][:, qk].flatten(), values])
    kept = {
        "attn.qkv.weight": (0, qkv),
        "attn.qkv.bias": (0, qkv),
        "attn.proj.weight": (1, values - 2 * 4 * 16),
        "mlp.fc1.weight": (0, hidden),
        "mlp.fc1.bias": (0, hidden),
        "mlp.fc2.weight": (1, hidden),
    }
    state = wide.state_dict()
    for name, tensor in state.items():
        if cut := kept.get(name.split(".", 2)[-1]):
            state[name] = tensor.index_select(*cut)
            tensor.mul_(_mask(tensor, *cut))
    narrow.load_state_dict(state)
    return narrow


def prune_embedding(wide: VisionTransformer) -> VisionTransformer:
    """A copy without every seventh channel of the tokens; those are set to zero in `wide`, wherever they occur."""
    kept = _kept_channels()
    narrow, state = _small_vit(len(kept), wide.widths), wide.state_dict()
    for name, tensor in state.items():
        for axis, size in enumerate(tensor.shape):
            if size == EMBED_DIM:
                state[name] = state[name].index_select(axis, kept)
                tensor.mul_(_mask(tensor, axis, kept))
    narrow.load_state_dict(state)
    return narrow


def _mask(tensor: Tensor, axis: int, kept: Tensor) -> Tensor:
    """1 at the kept indices of an axis, 0 elsewhere, to be multiplied with the tensor."""
    mask = torch.zeros(tensor.shape[axis], dtype=tensor.dtype).index_fill(0, kept, 1)
    return mask.reshape(-1, *[1] * (tensor.ndim - 1 - axis))
