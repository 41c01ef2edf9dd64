"""GCAB: a transformer that learns classes task by task, with a last block whose units each task reserves for itself.

Cotogni et al. 2025, "Exemplar-free Continual Learning of Vision Transformers via Gated Class-Attention and Cascaded
Feature Drift Compensation", IJCV 133, arXiv:2211.12292; authors' code OcraM17/GCAB-CFDC, an extension of DyTox. Hard
attention to the task (HAT), from which the gates come: Serra et al. 2018, arXiv:1801.01423.

A ConViT encoder makes tokens. One gated class-attention block (`gated_attention`) reads them once per task, with that
task's class token and under that task's gates, and the task's classifier follows. Entries of the block's weights that an
old task reads are reserved: what later tasks learn cannot change its output. The encoder stays free to learn;
compensating its drift, and the losses and schedules, are the trainer's.

Where we differ:
- Widths come from the model; their code fixes 384 and 1536.
- The block's own deviations are in `gated_attention`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from host.errors import ModelError
from host.models.checks import require_drop_path, require_images
from host.models.convit import MLP_RATIO, ConViTEncoder
from host.models.deploy import inference_copy, make_linear
from host.models.entry import ModelEntry
from host.models.gated_attention import FoldedBlock, GatedClassAttentionBlock


class TaskHeads(nn.Module):
    """Features [B, T * D], one part per task, to the logits of all tasks one after another [B, K]."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.tasks = nn.ModuleList()

    @property
    def out_features(self) -> int:
        return sum(linear.out_features for linear in self.tasks)

    def forward(self, features: Tensor) -> Tensor:
        parts = features.split(self.embed_dim, dim=1)
        return torch.cat([linear(part) for linear, part in zip(self.tasks, parts, strict=True)], dim=1)

    def merged(self) -> nn.Linear:
        """One linear head with the same output, zero outside its diagonal blocks."""
        weight = torch.block_diag(*(linear.weight for linear in self.tasks))
        return make_linear(weight, torch.cat([linear.bias for linear in self.tasks]))


class GatedViT(nn.Module):
    """Images [B, C, H, W] to features [B, T * D] and logits [B, K] of the classes of all T tasks; H = W = `image_size`.

    Args:
        tasks: number of classes of each task so far.
        depth: blocks of the encoder; the gated block is one more.
        drop_path: the rate of stochastic depth in the gated block; it falls linearly to 0 in the first block.

    Attributes:
        tasks: as above; K is their sum.

    Raises:
        ModelError: no such layout, or images of another shape arrive.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_chans: int,
        tasks: Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ModelError("tasks must name at least one task's number of classes, got none")
        require_drop_path(drop_path)
        self.image_size, self.in_chans, self.embed_dim = image_size, in_chans, embed_dim
        self.encoder = ConViTEncoder(
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_heads=num_heads,
            drop_paths=tuple(drop_path * index / depth for index in range(depth)),
        )
        self.class_block = GatedClassAttentionBlock(
            embed_dim=embed_dim, num_heads=num_heads, hidden_dim=MLP_RATIO * embed_dim, drop_path=drop_path
        )
        self.norms = nn.ModuleList()
        self.head = TaskHeads(embed_dim)
        self.tasks: tuple[int, ...] = ()
        for num_classes in tasks:
            self.add_task(num_classes)

    def add_task(self, num_classes: int) -> None:
        """Append a task: class token, gates, classifier. What earlier tasks need unchanged is frozen.

        Frozen are the earlier class tokens, gates and classifiers, and every LayerNorm of the encoder and the block.
        The block's matrices are protected by entry, and only by whoever trains: `class_block.mask_gradients` and
        `class_block.reserved_held`. The task that was the newest gets binary gates; its logits change once, here, by
        what was soft in them.

        Raises:
            ModelError: no classes, or this is an inference copy.
        """
        if not isinstance(self.class_block, GatedClassAttentionBlock):
            raise ModelError("an inference copy cannot take another task; add it to the model and call deploy() again")
        if num_classes < 1:
            raise ModelError(f"a task needs 1 class or more, got {num_classes}")
        if self.tasks:
            self._freeze_learned()
        weight = self.encoder.pos_embed
        self.class_block.add_task()
        self.norms.append(nn.LayerNorm(self.embed_dim).to(weight))
        self.head.tasks.append(nn.Linear(self.embed_dim, num_classes).to(weight))
        self.tasks = (*self.tasks, num_classes)
        self.feature_dim = len(self.tasks) * self.embed_dim

    def forward_tokens(self, images_nchw: Tensor) -> Tensor:
        """The encoder's tokens [B, N, D], which all tasks read."""
        require_images(self, images_nchw)
        return self.encoder(images_nchw)

    def class_attention(self, tokens: Tensor, task: int) -> Tensor:
        """Tokens [B, N, D], whether the encoder's or compensated for drift, to one task's features [B, D]."""
        return self.norms[task](self.class_block(tokens, task))

    def join_tasks(self, tokens: Sequence[Tensor]) -> Tensor:
        """Features [B, T * D], where each task reads tokens [B, N, D] of its own."""
        return torch.cat([self.class_attention(x, task) for task, x in enumerate(tokens)], dim=1)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        return self.join_tasks([self.forward_tokens(images_nchw)] * len(self.tasks))  # [B, T * D]

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> Self:
        """The inference form: constant position maps, gates in each task's own weights, one linear head."""
        model = inference_copy(self)
        if isinstance(model.class_block, FoldedBlock):
            return model  # it was deployed before
        model.encoder.fix_positions()
        model.class_block = FoldedBlock(model.class_block)
        model.head = model.head.merged()
        return model.eval()

    def _freeze_learned(self) -> None:
        for part in (self.encoder, self.class_block):
            for module in part.modules():
                if isinstance(module, nn.LayerNorm):
                    module.requires_grad_(False)
        self.norms.requires_grad_(False)
        self.head.requires_grad_(False)


_PAPER_SIZES = {"embed_dim": 384, "depth": 5, "num_heads": 12, "drop_path": 0.1}
_FIELD = {"depth": 3, "num_heads": 4, "drop_path": 0.0}


def cifar(*, num_classes: int, in_chans: int, **options: Any) -> GatedViT:
    """`cifar`: 32-pixel images in 8 x 8 patches of 4, as the authors have it for CIFAR-100."""
    return _build(32, 4, in_chans, num_classes, **options)


def tiny_imagenet(*, num_classes: int, in_chans: int, **options: Any) -> GatedViT:
    """`tiny-imagenet`: 64-pixel images in 8 x 8 patches of 8."""
    return _build(64, 8, in_chans, num_classes, **options)


def imagenet(*, num_classes: int, in_chans: int, **options: Any) -> GatedViT:
    """`imagenet`: 224-pixel images in 14 x 14 patches of 16, as the authors have it for ImageNet-100."""
    return _build(224, 16, in_chans, num_classes, **options)


def field_32(*, num_classes: int, in_chans: int, **options: Any) -> GatedViT:
    """`field-32`, ours and not the paper's: a small one for 32-pixel images.

    Against `cifar`: 96 channels instead of 384, 4 heads instead of 12, 3 encoder blocks instead of 5, and no stochastic
    depth.
    """
    return _build(32, 4, in_chans, num_classes, **{**_FIELD, "embed_dim": 96, **options})


def field_64(*, num_classes: int, in_chans: int, **options: Any) -> GatedViT:
    """`field-64`, ours and not the paper's: a small one for 64-pixel images.

    Against `tiny-imagenet`: 128 channels instead of 384, 4 heads instead of 12, 3 encoder blocks instead of 5, and no
    stochastic depth.
    """
    return _build(64, 8, in_chans, num_classes, **{**_FIELD, "embed_dim": 128, **options})


def _build(
    image_size: int, patch_size: int, in_chans: int, num_classes: int, /, *, tasks: Sequence[int] = (), **options: Any
) -> GatedViT:
    """GCAB's: 5 encoder blocks of 12 heads and D 384, stochastic depth 0.1; all classes are one task unless `tasks` says."""
    layout = {"image_size": image_size, "patch_size": patch_size, **_PAPER_SIZES, **options}
    if tasks and sum(tasks) != num_classes:
        raise ModelError(f"tasks {tuple(tasks)} have {sum(tasks)} classes together, but num_classes is {num_classes}")
    return GatedViT(in_chans=in_chans, tasks=tasks or (num_classes,), **layout)


def _entry(build: Callable[..., GatedViT], image_size: int, *, is_exact: bool = True, **facts: int) -> ModelEntry:
    size = "" if is_exact else "our small "
    return ModelEntry(
        family="gcab",
        variant=build.__name__.replace("_", "-"),
        build=build,
        image_size=image_size,
        summary=f"{size}continual ViT with gated class-attention for {image_size}-pixel images",
        paper="arXiv:2211.12292",
        float_scopes=("FoldedClassAttention",),  # one query wide, so int8 saves little; its softmax would be rounded
        is_exact=is_exact,
        **facts,
    )


# One task with all classes: encoder with its position embedding, gated block, and the task's class token, gates and
# classifier. DyTox, which has no gates, states 10.72 million for what is `cifar` without its 1,920 gate embeddings. MACs
# are those of the trainable form; the inference form needs fewer, depending on the gates.
ENTRIES: tuple[ModelEntry, ...] = (
    _entry(cifar, 32, num_classes=100, parameters=10_725_136, macs=604_608_768),
    _entry(tiny_imagenet, 64, num_classes=200, parameters=10_818_932, macs=608_186_112),
    _entry(imagenet, 224, num_classes=100, parameters=11_052_304, macs=2_006_079_552),
    _entry(field_32, 32, num_classes=10, parameters=458_854, macs=25_339_008, is_exact=False),
    _entry(field_64, 64, num_classes=100, parameters=838_432, macs=44_937_984, is_exact=False),
)
