"""A small convolutional network: quick to train, the teacher of the small EfficientFormer."""

from typing import Self

from torch import Tensor, nn

from host.models.checks import require_images
from host.models.deploy import fold_batch_norms, inference_copy
from host.models.entry import ModelEntry


class CNN(nn.Module):
    """Images [B, C, 32, 32] to features [B, 4 * width] and logits [B, K].

    Starts at half the resolution: the images it is meant for are 8-pixel images enlarged to 32.
    """

    image_size = 32

    def __init__(self, *, num_classes: int, in_chans: int, width: int = 32) -> None:
        super().__init__()
        self.in_chans, self.feature_dim = in_chans, 4 * width
        self.blocks = nn.Sequential(
            nn.AvgPool2d(2),  # [B, C, 16, 16]
            _conv_block(in_chans, width),
            _conv_block(width, width),
            nn.MaxPool2d(2),  # [B, width, 8, 8]
            _conv_block(width, 2 * width),
            _conv_block(2 * width, 2 * width),
            nn.MaxPool2d(2),  # [B, 2 * width, 4, 4]
            _conv_block(2 * width, self.feature_dim),
        )
        self.head = nn.Linear(self.feature_dim, num_classes)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        require_images(self, images_nchw)
        return self.blocks(images_nchw).mean(dim=(2, 3))  # [B, D]

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))  # [B, K]

    def deploy(self) -> Self:
        """The inference form: batch norms folded."""
        model = inference_copy(self)
        fold_batch_norms(model)
        return model


def _conv_block(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False), nn.BatchNorm2d(out_chans), nn.ReLU())


ENTRIES = (
    ModelEntry(
        family="cnn",
        variant="small",
        build=CNN,
        image_size=32,
        summary="small CNN, the teacher of the quickstart",
        paper="",
        parameters=140_458,
        macs=7_152_896,
        is_exact=False,
        num_classes=10,
        in_chans=1,
    ),
)
