"""Parametric contrastive learning (PaCo): the stronger of the two long-tail teachers.

Source: Cui et al. 2021, arXiv:2107.12028, and the authors' code (dvlab-research/Parametric-Contrastive-Learning). Each
image is told apart from the images of a queue and, in the same softmax, from the classes: its own class is a positive
of weight 1, images of the same class are positives of weight alpha. A second encoder, which follows the first slowly
(MoCo, He et al. 2020, arXiv:1911.05722), makes the queue's vectors. The classes' logits get the logarithm of the class
frequencies added in training and not at inference (balanced softmax, Ren et al. 2020, arXiv:2007.10740), so that the
model that remains is an ordinary classifier.

From the authors' scripts for CIFAR-100 with a ResNet-32: alpha 0.01 (0.05 on ImageNet-LT and iNaturalist), temperature
0.05, queue 1024, 32 contrast dimensions, momentum 0.999, 400 epochs of SGD with lr 0.05, weight decay 5e-4, batch 128.
Their factors beta and gamma are 1 in every script, and left out here. DeiT-LT (arXiv:2404.02900) gives the same sizes
for its PaCo teachers; their alpha, epochs and radius of sharpness-aware steps are not published.

Where we differ:
- The second view is made here, from the first one, by a function of tensors; theirs is another augmentation of the
  picture (on CIFAR that of SimCLR).
- The queue starts empty, theirs with random vectors and labels.
- Of several processes each takes its own keys, and goes on with the queue of the first one; theirs gather them.
- In the second pass of a sharpness-aware step, queue and second encoder stay as they are, as statistics of norms do.

Shapes: B batch, D features, E contrast dimensions, Q queue, P = 2 B + Q vectors to tell apart, K classes.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.distill.class_balance import require_counts_of, require_images_of_every_class
from host.errors import ModelError
from host.models.resnet_cifar import NormalizedLinear
from host.training.objective import Objective, Outcome

NO_LABEL = -1
"""Of places in the queue that were never filled."""
MAX_SHIFT = 8
"""Images are moved by up to their side divided by this."""


def flip_and_shift(images_nchw: Tensor) -> Tensor:
    """Mirror each image [B, C, H, W] by chance and move it by whole pixels; draws from PyTorch's own generator.

    What comes in at the border is 0, the mean of normalized images.
    """
    batch, _, height, width = images_nchw.shape
    sides = torch.tensor([width, height], device=images_nchw.device)
    shifts = ((2 * torch.rand(batch, 2, device=images_nchw.device) - 1) * sides / MAX_SHIFT).round()  # [B, 2], pixels
    maps = torch.eye(2, 3, device=images_nchw.device).repeat(batch, 1, 1)
    maps[:, 0, 0] = torch.randint(2, (batch,), device=images_nchw.device).to(maps) * 2 - 1
    maps[:, :, 2] = 2 * shifts / sides  # in affine_grid's coordinates, where the side is 2
    grid = F.affine_grid(maps, list(images_nchw.shape), align_corners=False)
    return F.grid_sample(images_nchw, grid, align_corners=False)


class PaCo(Objective):
    """Cross-entropy over classes and images together.

    The model's features and head are trained; after training they are all that is needed. Contrasts are between
    vectors of length 1 that a small network makes of the features.

    Args:
        model: has `forward_features`, `feature_dim` and a linear `head`.
        class_counts: training images of each class.
        contrast_dim: E.
        queue_size: Q.
        temperature: contrasts are divided by it; the classes' logits are not.
        alpha: weight of an image of the same class, beside that of the class itself, 1.
        momentum: share of its weights that the second encoder keeps in each step.
        second_view: another view of a batch of augmented images. The default mirrors, which changes digits or letters.

    Attributes:
        projection: features to contrast dimensions; of no use after training, like all that begins with `key_`.
        queue, queue_labels: the last keys [Q, E] and labels [Q], in a ring.
        queue_next: where the next key goes, int64 [].

    Raises:
        ModelError: logits that are cosines, which could never outweigh the contrasts.
        DataError: a class has no image, or the counts are of other classes.
    """

    takes_mixed = False  # an image of two classes is no positive of either

    def __init__(
        self,
        model: nn.Module,
        class_counts: Sequence[int],
        *,
        contrast_dim: int = 32,
        queue_size: int = 1024,
        temperature: float = 0.05,
        alpha: float = 0.01,
        momentum: float = 0.999,
        second_view: Callable[[Tensor], Tensor] = flip_and_shift,
    ) -> None:
        super().__init__(model)
        if isinstance(model.head, NormalizedLinear):
            raise ModelError(
                f"PaCo needs a linear classifier, and this {type(model).__name__} has a NormalizedLinear; "
                "take one such as resnet-cifar/32"
            )
        require_counts_of(model, class_counts)
        require_images_of_every_class(class_counts)
        self.temperature, self.alpha, self.momentum = temperature, alpha, momentum
        self.second_view = second_view
        self.projection = _projection(model.feature_dim, contrast_dim)
        self.key_model = copy.deepcopy(model).requires_grad_(False)
        self.key_projection = copy.deepcopy(self.projection).requires_grad_(False)
        log_prior = torch.tensor(class_counts, dtype=torch.float64).log().log_softmax(dim=0).float()
        self.register_buffer("log_prior", log_prior, persistent=False)
        self.register_buffer("queue", torch.zeros(queue_size, contrast_dim))
        self.register_buffer("queue_labels", torch.full((queue_size,), NO_LABEL))
        self.register_buffer("queue_next", torch.tensor(0))

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        assert targets is None
        is_first_pass = self.projection[1].momentum > 0  # `frozen_statistics` makes it 0 in the second
        if is_first_pass:
            self._follow()
        features = self.model.forward_features(images_nchw)
        logits = self.model.head(features)
        queries = F.normalize(self.projection(features).float())  # [B, E]
        keys = self._keys(images_nchw)
        loss = paco_loss(
            logits.float() + self.log_prior,
            queries,
            torch.cat([queries, keys, self.queue]),
            torch.cat([labels, labels, self.queue_labels]),
            temperature=self.temperature,
            alpha=self.alpha,
        )
        if is_first_pass:
            self._enqueue(keys, labels)
        return Outcome(loss, logits, labels)

    @torch.no_grad()
    def _keys(self, images_nchw: Tensor) -> Tensor:
        features = self.key_model.forward_features(self.second_view(images_nchw))
        return F.normalize(self.key_projection(features).float())

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the second encoder's weights towards the first one's."""
        for keys, queries in ((self.key_model, self.model), (self.key_projection, self.projection)):
            torch._foreach_lerp_(list(keys.parameters()), list(queries.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor, labels: Tensor) -> None:
        """Put a batch in the place of the oldest keys."""
        size = len(self.queue)
        keys, labels = keys[-size:], labels[-size:]
        places = (self.queue_next + torch.arange(len(keys), device=keys.device)) % size
        self.queue[places], self.queue_labels[places] = keys, labels
        self.queue_next.add_(len(keys)).remainder_(size)


def paco_loss(
    class_logits: Tensor,
    queries: Tensor,
    vectors: Tensor,
    vector_labels: Tensor,
    *,
    temperature: float,
    alpha: float,
) -> Tensor:
    """Scalar loss of a batch.

    Args:
        class_logits: [B, K], with the logarithms of class frequencies.
        queries: [B, E] of length 1.
        vectors: [P, E] of length 1; the first B are the queries themselves, which are not compared with themselves.
        vector_labels: int64 [P]; `NO_LABEL` leaves a vector out.
        temperature: what products of vectors are divided by.
        alpha: weight of a vector of the same class.
    """
    labels = vector_labels[: len(queries)]
    with torch.autocast(queries.device.type, enabled=False):  # divided by 0.05, roundings of bfloat16 are large
        contrasts = queries @ vectors.T / temperature  # [B, P]
    is_compared = (vector_labels != NO_LABEL) & ~torch.eye(*contrasts.shape, dtype=torch.bool, device=queries.device)
    logits = torch.cat([class_logits, contrasts.masked_fill(~is_compared, -torch.inf)], dim=1)  # [B, K + P]
    is_positive = is_compared & (labels[:, None] == vector_labels)
    weights = torch.cat([F.one_hot(labels, class_logits.shape[1]), alpha * is_positive.to(logits)], dim=1)
    log_probabilities = logits.log_softmax(dim=1).masked_fill(weights == 0, 0)  # 0 times minus infinity is not 0
    return -((weights * log_probabilities).sum(dim=1) / weights.sum(dim=1)).mean()


def _projection(feature_dim: int, contrast_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(feature_dim, feature_dim),
        nn.BatchNorm1d(feature_dim),
        nn.ReLU(),
        nn.Linear(feature_dim, contrast_dim),
    )
