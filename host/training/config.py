"""How to train: plain data, read from a recipe without PyTorch."""

from dataclasses import dataclass

from host.errors import RecipeError

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "steps")
CROPS = ("none", "pad", "resized")
PRECISIONS = ("float32", "bfloat16", "float16")
LOSSES = ("cross-entropy", "ldam", "paco")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The [train] table of a recipe. Nothing in it depends on how many processes train.

    Attributes:
        epochs: passes over the training images; 0 leaves pretrained weights as they are.
        batch_size: images per step of the optimizer, over all processes.
        accumulate: parts that a process's share of a batch is computed in, one after the other, to save memory.
        optimizer: `adamw`, or `sgd` with Nesterov `momentum`.
        sam_radius: of sharpness-aware minimization around either optimizer; 0 is without.
        schedule: `cosine` down to `final_learning_rate`, or `steps`: x 0.01 at 80 % of the epochs, x 0.0001 at 90 %.
        warmup_share: of all steps, over which the learning rate rises linearly.
        weight_decay: of matrices and kernels; biases, norms, scales, tokens and position embeddings do not decay.
        loss: `cross-entropy`; for long-tailed data `ldam` or `paco` (`host.distill`).
        reweight_share: of the epochs, before classes weigh by their rarity, in `ldam` and in DeiT-LT; 1 is never.
        label_smoothing: of the labels, also of mixed ones.
        max_grad_norm: longer gradients are shortened to it; 0 leaves them.
        ema_decay: keep the exponential moving average of the weights, which is then what training leaves; 0 is without.
        precision: `bfloat16` or `float16` compute under autocast, weights stay float32; `float16` needs a GPU.
        crop: `none` resizes images as the board does; `pad` adds an eighth of the side around and cuts at random;
            `resized` cuts a random part of 25 to 100 % of the area, and resizes that.
        flip: probability of a horizontal flip, where images are cropped.
        rand_augment: timm's name of a RandAugment policy, such as `rand-m9-mstd0.5-inc1`; empty is without.
        color_jitter: of brightness, contrast and saturation, where there is no RandAugment.
        erasing: probability that a random rectangle is replaced by noise.
        mixup, cutmix: alphas of both ways to mix two images; 0 is without.
        mix_share: of the epochs, from the first, in which images are mixed.
        repeats: different augmentations of an image within a batch (repeated augmentation).
        augment_strength: of a random affine and elastic distortion, for drawings and digits; 0 is without.
        turned_share: of images that are turned by 90, 180 or 270 degrees and count as classes of their own, which makes
            features that tell more apart than the labels ask for; it is what new classes are learned from later.
        workers: processes that load images, per training process; 0 loads between the steps.
    """

    epochs: int = 60
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.0
    momentum: float = 0.9
    sam_radius: float = 0.0
    schedule: str = "cosine"
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    loss: str = "cross-entropy"
    reweight_share: float = 1.0
    label_smoothing: float = 0.1
    max_grad_norm: float = 5.0
    ema_decay: float = 0.0
    precision: str = "float32"
    crop: str = "none"
    flip: float = 0.0
    rand_augment: str = ""
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_share: float = 1.0
    repeats: int = 1
    augment_strength: float = 0.0
    turned_share: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "learning_rate", "repeats"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"train.{name} must be above 0, got {getattr(self, name)}")
        for name in ("epochs", "weight_decay", "max_grad_norm", "sam_radius", "final_learning_rate", "workers"):
            if getattr(self, name) < 0:
                raise RecipeError(f"train.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("augment_strength", "color_jitter", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise RecipeError(f"train.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("warmup_share", "label_smoothing", "turned_share", "momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"train.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("flip", "erasing", "mix_share", "reweight_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"train.{name} must be within 0..1, got {getattr(self, name)}")
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("crop", CROPS),
            ("precision", PRECISIONS),
            ("loss", LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"train.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.batch_size % (self.accumulate * self.repeats):
            raise RecipeError(
                f"train.batch_size {self.batch_size} must be a multiple of accumulate x repeats, {self.accumulate} x {self.repeats}"
            )
        if self.crop == "none" and (self.flip or self.rand_augment or self.color_jitter):
            raise RecipeError(
                'train.flip, rand_augment and color_jitter need train.crop = "pad" or "resized"; set it, or leave them out'
            )
        if self.is_mixing and self.turned_share:
            raise RecipeError("train.mixup and cutmix cannot go with turned_share; set turned_share = 0")
        if self.loss != "cross-entropy" and (self.is_mixing or self.turned_share or self.label_smoothing):
            raise RecipeError(
                f'train.loss "{self.loss}" cannot go with mixup, cutmix, turned_share or label_smoothing; set them to 0'
            )
        if self.sam_radius and self.precision == "float16":
            raise RecipeError('train.sam_radius cannot go with precision "float16"; take "bfloat16"')

    @property
    def reweight_from_epoch(self) -> int | None:
        """The first epoch, counted from 1, in which classes weigh by their rarity; None: never."""
        first = round(self.reweight_share * self.epochs) + 1
        return first if first <= self.epochs else None

    @property
    def is_mixing(self) -> bool:
        """Whether images are mixed in some epoch."""
        return bool(self.mixup or self.cutmix) and self.mix_share > 0
