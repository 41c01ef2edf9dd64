"""What models are probed with, in benchmarks and tests: weights that hide nothing, random images and real photos."""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

SMALL_SHARE = 0.3


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move biases, norms, layer scales and statistics off their zeros and ones, which would hide a broken branch.

    Matrices keep unit gain, so that deep models stay in range. In evaluation mode afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.numel():
                tensor.copy_(_draw(name, tensor, generator))
    return model.train().eval()  # caches of what depends on weights are made anew


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    is_scale = name.endswith(("running_var", "gamma")) or (tensor.ndim == 1 and name.endswith("weight"))
    if is_scale:
        return 0.75 + 0.5 * noise.sigmoid()
    if tensor.ndim <= 1:
        return SMALL_SHARE * noise
    return noise * tensor[0].numel() ** -0.5


def settle_norms(model: nn.Module, images_nchw: Tensor) -> nn.Module:
    """Take the statistics of batch norms from images, as training leaves them; drawn ones let deep models overflow."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(images_nchw)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.train().eval()


def make_images(count: int, size: int, channels: int = 3, seed: int = 1) -> Tensor:
    """Random images [B, C, H, W]."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def photos(size: int, channels: int = 3, count: int = 8) -> np.ndarray:
    """Crops of the two photographs that ship with scikit-learn, float32 [N, H, W, C] around 0."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    crops = []
    for index in range(count):
        photo = load_sample_images().images[index % 2]
        top, left = 40 * (index // 2), 90 * (index // 2)
        crop = Image.fromarray(photo[top : top + 300, left : left + 300]).resize((size, size), Image.Resampling.BICUBIC)
        crops.append(np.asarray(crop, np.float32))
    images = (np.stack(crops) / 255 - 0.45) / 0.25
    return images if channels == 3 else images.mean(axis=3, keepdims=True)


def photo_crops(size: int, channels: int = 3, *, count: int, seed: int) -> np.ndarray:
    """Random crops, of 150 to 400 pixels, of the same two photographs: float32 [N, H, W, C] around 0."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng, sources, crops = np.random.default_rng(seed), load_sample_images().images, []
    for index in range(count):
        photo = sources[index % len(sources)]  # uint8 [427, 640, 3]
        side = int(rng.integers(150, 401))
        top, left = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
        crop = Image.fromarray(photo[top : top + side, left : left + side])
        crops.append(np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float32))
    images = (np.stack(crops) / 255 - 0.45) / 0.25
    return images if channels == 3 else images.mean(axis=3, keepdims=True)


def relative_error(outputs: Tensor, reference: Tensor) -> float:
    """The largest difference, as a share of the largest value of the reference."""
    return float((outputs - reference).abs().max() / reference.abs().max())


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The digits that ship with scikit-learn: images float32 [1797, 1, 8, 8] in -1..1, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 8 - 1, torch.from_numpy(found.target).long()
