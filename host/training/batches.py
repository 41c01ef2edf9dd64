"""Which images make which batch, and how they get ready: everything depends on seed and position alone.

The order of an epoch follows from (seed, epoch), the augmentation of an image from (seed, epoch, image). So a run that
goes on after a stop, in another number of loading processes, or on several machines, sees the very same batches.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from device.contract.manifest import InputSpec
from host.data.inputs import to_input
from host.data.splits import LabeledImages
from host.errors import TrainingError
from host.training.config import TrainConfig
from host.training.transforms import make_transform

BLOCKS_TOGETHER = 8
"""Shards whose images are shuffled together, where images lie in shards: reading stays local."""


class Place(NamedTuple):
    """One image of an epoch: `repeat` tells its augmentations apart."""

    epoch: int
    index: int
    repeat: int


class EpochBatches:
    """The batches of an epoch for one of `world_size` processes; what does not fill a batch has its turn another time.

    Iterating gives lists of `Place`, of `accumulate` parts per step; set `epoch` and `first_step` before. An epoch has
    as many images as there are, so with repeated augmentation it sees every image of a part of them several times
    (Hoffer et al. 2020, arXiv:1901.09335).
    """

    def __init__(
        self, images: LabeledImages, config: TrainConfig, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.images, self.config, self.seed = images, config, seed
        self.rank, self.world_size = rank, world_size
        self.part_size, rest = divmod(config.batch_size, config.accumulate * world_size)
        self.steps = len(images) // config.batch_size
        self.epoch = 1
        self.first_step = 0
        if rest:
            raise TrainingError(
                f"train.batch_size {config.batch_size} cannot be shared by {world_size} processes x {config.accumulate} "
                "parts; make it a multiple"
            )
        if config.is_mixing and self.part_size % 2:
            raise TrainingError(
                f"mixing takes images in pairs, but a process has {self.part_size} at a time; make train.batch_size a "
                f"multiple of {2 * config.accumulate * world_size}"
            )
        if not self.steps:
            raise TrainingError(
                f"{len(images)} images are fewer than a batch of {config.batch_size}; lower train.batch_size"
            )

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.config.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        order = epoch_order(self.images, self.epoch, self.seed).repeat(self.config.repeats)  # [N * repeats]
        for step in range(self.first_step, self.steps):
            first = step * self.config.batch_size
            for part in range(self.config.accumulate):
                start = first + (part * self.world_size + self.rank) * self.part_size
                positions = range(start, start + self.part_size)
                yield [Place(self.epoch, int(order[at]), at % self.config.repeats) for at in positions]


def epoch_order(images: LabeledImages, epoch: int, seed: int) -> np.ndarray:
    """All indices in the order of an epoch, int64 [N]; block by block where the images lie in blocks."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(images))
    if images.blocks is None:
        return order
    names, blocks = np.unique(images.blocks, return_inverse=True)
    window = rng.permutation(len(names)) // BLOCKS_TOGETHER  # of each block
    return order[np.argsort(window[blocks[order]], kind="stable")]


class TrainingImages(Dataset):
    """Images as a `DataLoader` wants them: augmented one by one, made input batch by batch."""

    def __init__(self, images: LabeledImages, spec: InputSpec, config: TrainConfig, *, seed: int) -> None:
        self.images, self.spec, self.seed = images, spec, seed
        self.transform = make_transform(spec, config)

    def __getitem__(self, place: Place) -> tuple[np.ndarray, int]:
        image = self.images.images[place.index]  # uint8 [h, w, C]
        if self.transform:
            seed_all(self.seed, *place)
            image = self.transform(image)
        return image, int(self.images.labels[place.index])

    def collate(self, samples: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
        """Model input float32 [B, C, H, W] and labels int64 [B]."""
        images, labels = zip(*samples, strict=True)
        return torch.from_numpy(to_input(images, self.spec)).permute(0, 3, 1, 2), torch.tensor(labels)


def make_loader(dataset: TrainingImages, batches: EpochBatches, *, workers: int) -> DataLoader:
    """Loads the epoch that `batches` is set to each time it is iterated.

    Loading processes are not forked: this one may have threads, of OpenMP or of a converter, that a fork would break.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def seed_all(*numbers: int) -> None:
    """Seed all generators that transforms draw from: Python's, NumPy's and PyTorch's."""
    seed = hash(numbers) & 0xFFFFFFFF
    random.seed(seed)
    np.random.seed(seed)  # timm draws from the global one
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` formats a stack for CUDA, used or not: slow
    if torch.cuda.is_available() and not get_worker_info():
        torch.cuda.manual_seed(seed)
