"""Models, each with `forward_features(images_nchw) -> [B, D]` and a linear `head`.

Importing any of them repairs torchvision on CPU builds of PyTorch first, because timm needs it.
"""

from host.models import torchvision_guard

torchvision_guard.apply()
