"""Residual networks for 32-pixel images: the teachers of long-tailed training.

He et al. 2016, arXiv:1512.03385, section 4.2: a 3 x 3 convolution, three stages of n blocks with 16, 32 and 64
channels, mean over positions, a linear layer; 6 n + 2 layers. LDAM (Cao et al. 2019, arXiv:1906.07413) trains ResNet-32
with a normalized classifier: its logits are the cosines of features and class weights, in -1..1. What they are
multiplied by belongs to the loss (30 there), so that soft distillation from such a teacher needs that factor as well,
while labels taken from it do not.

Shortcuts between stages are option A, as in both papers' experiments: every second row and column, and zero channels.
Names are those of the LDAM authors' code, apart from the head, as is the place of the zero channels: half in front of
the others, half behind them. Weights start as He et al. 2015 draw them, from the inputs of a layer; class weights of a
normalized classifier start with length 1.

The inference form takes option A as a 1 x 1 convolution of stride 2 with weights 0 and 1: the same output to the bit,
and XNNPACK refuses slices with a step. The two cost 262,144 MACs, 0.38 % of ResNet-32's.

Shapes: B batch, C channels, H W image, D = 64 features, K classes.
"""

from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError
from host.models.checks import require_images
from host.models.deploy import fold_batch_norms, inference_copy, make_linear, replace_modules
from host.models.entry import ModelEntry

WIDTHS = (16, 32, 64)


class NormalizedLinear(nn.Module):
    """Features [B, D] of length 1 to their cosines [B, K] with the weights of each class."""

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.out_features = num_classes
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, feature_dim)))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, F.normalize(self.weight))

    def merged(self) -> nn.Linear:
        """A linear layer with the same output."""
        return make_linear(F.normalize(self.weight), self.weight.new_zeros(self.out_features))


class Subsample(nn.Module):
    """Option A: [B, C, H, W] to [B, 2 C, H / 2, W / 2], every second pixel between zero channels."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans

    def forward(self, x: Tensor) -> Tensor:
        margin = self.in_chans // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, margin, margin))

    def as_convolution(self) -> nn.Conv2d:
        """A convolution with the same output, and without gradients."""
        conv = nn.Conv2d(self.in_chans, 2 * self.in_chans, 1, stride=2, bias=False, device="meta")
        identity = F.pad(torch.eye(self.in_chans), (0, 0, self.in_chans // 2, self.in_chans // 2))  # [2 C, C]
        conv.weight = nn.Parameter(identity[:, :, None, None], requires_grad=False)
        return conv


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: [B, I, H, W] to [B, O, H, W], or to half the size with O = 2 I."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        is_wider = out_chans != in_chans
        self.conv1 = _conv3x3(in_chans, out_chans, stride=2 if is_wider else 1)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = _conv3x3(out_chans, out_chans)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.shortcut = Subsample(in_chans) if is_wider else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    """Images [B, C, 32, 32] to features [B, 64] and logits [B, K].

    Args:
        num_classes: K.
        in_chans: C.
        depth: number of layers with weights, 6 n + 2: 20, 32, 44, 56, 110.
        is_normalized: whether features have length 1 and logits are cosines; then the head has no bias.

    Raises:
        ModelError: no network has that depth.
    """

    image_size = 32
    feature_dim = WIDTHS[-1]

    def __init__(self, *, num_classes: int, in_chans: int, depth: int = 32, is_normalized: bool = False) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ModelError(f"depth must be 6 n + 2, such as 20, 32 or 56, got {depth}")
        self.in_chans = in_chans
        self.is_normalized = is_normalized
        num_blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(in_chans, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], num_blocks)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], num_blocks)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], num_blocks)
        self.head = (NormalizedLinear if is_normalized else nn.Linear)(self.feature_dim, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, D], of length 1 under a normalized classifier."""
        require_images(self, images_nchw)
        x = F.relu(self.bn1(self.conv1(images_nchw)))  # [B, 16, 32, 32]
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 64, 8, 8]
        features = x.mean(dim=(2, 3))
        return F.normalize(features) if self.is_normalized else features

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> Self:
        """The inference form: batch norms folded, shortcuts as convolutions, one linear head."""
        model = inference_copy(self)
        fold_batch_norms(model)
        replace_modules(model, Subsample, lambda module: module.as_convolution().to(model.conv1.weight))
        if isinstance(model.head, NormalizedLinear):
            model.head = model.head.merged()
        return model.eval()  # modules are made in training mode


def _conv3x3(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)


def _stage(in_chans: int, out_chans: int, num_blocks: int) -> nn.Sequential:
    """The first block halves the image where the channels double."""
    return nn.Sequential(*(BasicBlock(in_chans if i == 0 else out_chans, out_chans) for i in range(num_blocks)))


def _entry(depth: int, parameters: int, macs: int, *, is_normalized: bool = False) -> ModelEntry:
    return ModelEntry(
        family="resnet-cifar",
        variant=f"{depth}-normalized" if is_normalized else str(depth),
        build=partial(ResNet, depth=depth, is_normalized=is_normalized),
        image_size=ResNet.image_size,
        summary=f"ResNet-{depth} for 32-pixel images{', cosine classifier for LDAM' if is_normalized else ''}",
        paper="arXiv:1906.07413" if is_normalized else "arXiv:1512.03385",
        parameters=parameters,
        macs=macs,
        is_exact=True,
        num_classes=10,
    )


ENTRIES = (
    _entry(20, 269_722, 40_551_040),
    _entry(32, 464_154, 68_862_592),
    _entry(32, 464_144, 68_862_592, is_normalized=True),
)
