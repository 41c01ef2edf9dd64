"""A backbone that timm keeps, behind our protocol: features [B, D], a head apart from them, and `deploy()`."""

from typing import Self

from torch import Tensor, nn

from host.models.checks import require_channels
from host.models.deploy import fold_batch_norms, inference_copy
from host.models.entry import StateDict
from host.models.heads import TIMM_HEADS, DistillationHeads, renamed


class TimmClassifier(nn.Module):
    """Images [B, C, H, W] to features [B, D] and logits [B, K]; H = W = `image_size`.

    A family's subclass says in `rewrite_backbone` what its inference form changes.

    Args:
        backbone: a timm model built with `num_classes=0`.
        image_size: what it was built for.
        num_classes: K.
        is_distilled: whether a second head follows a teacher.
    """

    def __init__(self, backbone: nn.Module, *, image_size: int, num_classes: int, is_distilled: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size, self.in_chans = image_size, backbone.in_chans
        self.feature_dim = backbone.num_features
        make = DistillationHeads if is_distilled else nn.Linear
        self.head = make(self.feature_dim, num_classes)
        for linear in self.head.modules():
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        require_channels(self, images_nchw)  # most backbones take any size; a subclass may refuse others
        maps = self.backbone.forward_features(images_nchw)  # [B, D, h, w]
        return self.backbone.forward_head(maps, pre_logits=True)  # [B, D]

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> Self:
        """The inference form: rewritten blocks, batch norms folded, one linear head."""
        model = inference_copy(self)
        if isinstance(model.head, DistillationHeads):
            model.head = model.head.merged()
        model.rewrite_backbone()
        fold_batch_norms(model)
        return model

    def rewrite_backbone(self) -> None:
        """Replace blocks of `self.backbone` by their inference forms."""


def from_timm(state: StateDict) -> dict[str, Tensor]:
    """Give timm's weights the names of a `TimmClassifier`: the heads are ours, the rest is the backbone's."""
    return renamed(state, {**TIMM_HEADS, "": "backbone."})
