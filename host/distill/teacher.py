"""A teacher that stays as it is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from host.errors import ModelError
from host.models.deploy import inference_copy


class FrozenTeacher:
    """Logits and features of a copy of a model, in evaluation mode and without gradients.

    Not a module: an objective that holds one neither trains it nor writes it to a checkpoint, and several processes
    have nothing of it to synchronize. It goes to the device of the first batch and computes in whatever precision the
    caller's autocast has switched on. A model with two heads answers with their mean, as at inference.

    It sees the student's own images, augmented and mixed (DeiT-LT, arXiv:2404.02900), so both must expect the same
    normalization of pixels. Where its images are of another size, they are resized bilinearly, with anti-aliasing; the
    DeiT-LT authors' code does that bicubically.

    Args:
        model: has `forward_features`, `head`, `image_size` and `feature_dim`; copied.
        num_classes: the student's.

    Raises:
        ModelError: the model has another number of classes.
    """

    def __init__(self, model: nn.Module, *, num_classes: int) -> None:
        if model.head.out_features != num_classes:
            raise ModelError(
                f"the teacher, a {type(model).__name__}, tells {model.head.out_features} classes apart and the student "
                f"{num_classes}; train the teacher on the student's classes"
            )
        self.model = inference_copy(model)
        self.image_size, self.feature_dim = model.image_size, model.feature_dim

    @torch.no_grad()
    def __call__(self, images_nchw: Tensor) -> Tensor:
        """Logits [B, K]."""
        return self.model(self._fit(images_nchw))

    @torch.no_grad()
    def features(self, images_nchw: Tensor) -> Tensor:
        """Features [B, `feature_dim`]."""
        return self.model.forward_features(self._fit(images_nchw))

    def _fit(self, images_nchw: Tensor) -> Tensor:
        """Images on the same device as the model, in its size; the model is the one that moves."""
        if next(self.model.parameters()).device != images_nchw.device:
            self.model.to(images_nchw.device)
        size = (self.image_size, self.image_size)
        if images_nchw.shape[2:] == size:
            return images_nchw
        return F.interpolate(images_nchw, size=size, mode="bilinear", align_corners=False, antialias=True)
