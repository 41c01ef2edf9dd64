"""Augmentation of single images through torchvision and timm; of whole batches: erasing and mixing through timm.

They draw from the global generators of Python, NumPy and PyTorch, which the caller seeds.
"""

from collections.abc import Callable

import host.models  # noqa: F401  # repairs torchvision, which timm imports

# isort: split
import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from device.contract.manifest import InputSpec
from host.data.augment import augment
from host.errors import RecipeError
from host.training.config import TrainConfig

LEAST_AREA = 0.25
"""Of crop `resized`; ImageNet's usual 0.08 loses small things in small pictures."""
PADDING_SHARE = 8
"""Crop `pad` adds the side divided by this."""

Transform = Callable[[np.ndarray], np.ndarray]


def make_transform(spec: InputSpec, config: TrainConfig) -> Transform | None:
    """Image uint8 [h, w, C] to uint8 [H, W, C]; None where images stay as they are."""
    if config.crop == "none":
        return None
    size = (spec.height, spec.width)
    steps: list[Callable] = []
    if config.crop == "resized":
        steps.append(RandomResizedCropAndInterpolation(size, scale=(LEAST_AREA, 1.0), interpolation="bilinear"))
    else:
        steps += [_Resize(size), transforms.RandomCrop(size, padding=max(spec.height // PADDING_SHARE, 1))]
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip(config.flip))
    if config.rand_augment:
        steps.append(_rand_augment(config.rand_augment, spec))
    elif config.color_jitter:
        steps.append(transforms.ColorJitter(*[config.color_jitter] * 3))
    return _Pipeline(steps)


def _rand_augment(policy: str, spec: InputSpec) -> Callable:
    """Timm's RandAugment; what comes in at a border has the mean colour of the model's input."""
    fill = tuple(round(255 * value) for value in spec.mean)
    try:
        transform = rand_augment_transform(policy, {"img_mean": fill if len(fill) > 1 else fill[0]})
    except (AssertionError, ValueError, KeyError) as error:
        raise RecipeError(
            f'train.rand_augment {policy!r} is not one of timm\'s policies; write it like "rand-m9-mstd0.5-inc1"'
        ) from error
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(picture: Image.Image, bits: int, **ignored: object) -> Image.Image:
    """As timm's, but never to 0 bits, which is a black picture, and from Pillow 13 on an error."""
    return posterize(picture, max(bits, 1))


class _Pipeline:
    """Steps on a Pillow image; a class, so that loading processes can receive it."""

    def __init__(self, steps: list[Callable]) -> None:
        self.steps = steps

    def __call__(self, image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        for step in self.steps:
            picture = step(picture)
        array = np.asarray(picture)
        return array[..., None] if array.ndim == 2 else array


class _Resize:
    """To the model's size, unless the image has it."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        return (
            picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BILINEAR)
        )


class BatchAugmentation:
    """What is done to a whole batch on the device that trains: distortion, erasing, mixing."""

    def __init__(self, config: TrainConfig, *, num_classes: int, torch_device: torch.device) -> None:
        self.strength = config.augment_strength
        self.mix_epochs = round(config.epochs * config.mix_share)
        self.erase = None
        if config.erasing:
            self.erase = RandomErasing(config.erasing, mode="pixel", device=torch_device)
        self.mix = None
        if config.is_mixing:
            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images_nchw: Tensor, labels: Tensor, *, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Changed images [B, C, H, W], and targets [B, K] where they were mixed; labels int64 [B]."""
        if self.strength:
            images_nchw = augment(images_nchw, torch.default_generator, strength=self.strength)
        if self.erase:
            images_nchw = self.erase(images_nchw)
        if self.mix and epoch <= self.mix_epochs:
            return self.mix(images_nchw, labels)
        return images_nchw, None
