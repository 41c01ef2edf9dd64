"""A tiny hybrid in the manner of EfficientFormer: convolutions and pooling, then one attention block.

Import it, never run it as a script: tensor names hold the module path of each layer, and `__main__` is another one.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from device.contract.board import Board, load_board

INPUT_SHAPE = (1, 16, 16, 1)
MAX_CLASSES = 7
BATCH_SIZE = 8
FORMS = ("w8", "palette6", "ios18", "grouped4", "w8a8", "train", "w8_train", "w8a8_train", "grouped4_train")
LABELS = ("zero", "one", "two", "three")
INPUT_SPEC = {"height": 16, "width": 16, "channels": 1, "mean": [0.5], "std": [0.5]}


class PoolMixer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.fc1, self.norm1 = nn.Conv2d(dim, 2 * dim, 1), nn.BatchNorm2d(2 * dim)
        self.fc2, self.norm2 = nn.Conv2d(2 * dim, dim, 1), nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * (self.pool(x) - x)
        return x + self.scale * self.norm2(self.fc2(self.act(self.norm1(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_tokens: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(num_heads, num_tokens, num_tokens))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, self.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.bias).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, dim))


class TinyHybrid(nn.Module):
    def __init__(self, num_classes: int = len(LABELS)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.mixer = PoolMixer(24)
        self.down = nn.Sequential(nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48))
        self.norm1, self.attention = nn.LayerNorm(48), Attention(48, 2, 16)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(48), nn.Linear(48, 96), nn.Linear(96, 48)
        self.head = nn.Linear(24 + 48, num_classes)

    def forward_features(self, images_nchw: Tensor) -> Tensor:
        early = self.mixer(self.stem(images_nchw))  # [B, 24, 8, 8]
        tokens = self.down(early).flatten(2).transpose(1, 2)  # [B, 16, 48]
        tokens = tokens + self.attention(self.norm1(tokens))
        tokens = tokens + self.fc2(nn.functional.gelu(self.fc1(self.norm2(tokens))))
        return torch.cat([early.mean((2, 3)), tokens.mean(1)], dim=1)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.head(self.forward_features(images_nchw))


def make_model() -> nn.Module:
    """Every bias, norm and statistic off its default, which would hide a swapped or dropped one."""
    return randomize(TinyHybrid(), make_images(64))


def randomize(model: nn.Module, images: np.ndarray) -> nn.Module:
    """Draw every parameter, and take the statistics of normalizations from these images."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or name.endswith(("scale", "bias")):
                parameter.copy_(0.3 * noise if name.endswith("bias") else 0.8 + 0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = None  # plain average: statistics of exactly these images
        model.train()(torch.from_numpy(images).permute(0, 3, 1, 2))
    return model.eval()


def make_images(count: int, size: int = 16) -> np.ndarray:
    """Blurred noise, float32 [N, size, size, 1]: smooth like photographs, different from one another."""
    noise = np.random.default_rng(1).standard_normal((count, size + 3, size + 3, 1))
    windows = np.lib.stride_tricks.sliding_window_view(noise, (4, 4), axis=(1, 2))
    return (2 * windows.mean(axis=(-1, -2))).astype(np.float32)


def board_of_ios(minimum_ios: int) -> Board:
    """The profile of a phone whose oldest iOS is this one."""
    board = load_board("iphone-15")
    return replace(board, support=replace(board.support, minimum_ios=minimum_ios))


def write_coreml_forms(model: nn.Module, package: Path, directory: Path) -> dict[str, Path]:
    """Every other form of a Core ML package, by name; `package` is the float16 one."""
    from converters import coreml, coreml_compress, coreml_multifunction, coreml_w8a8

    facts = {"input_spec_metadata": INPUT_SPEC, "labels": LABELS}
    paths = {name: directory / f"{name}.mlpackage" for name in FORMS}
    coreml_compress.quantize_weights(package, paths["w8"])
    coreml_compress.palettize_weights(package, paths["palette6"], board=board_of_ios(17), num_bits=6)
    coreml.convert(model, INPUT_SHAPE, paths["ios18"], minimum_ios=18, **facts)
    coreml_compress.palettize_weights(
        paths["ios18"], paths["grouped4"], board=board_of_ios(18), num_bits=4, group_size=8
    )
    coreml_w8a8.convert(model, INPUT_SHAPE, paths["w8a8"], calibration_images=make_images(48)[:32], **facts)
    coreml_multifunction.convert_train_step(
        paths["train"], feature_dim=24 + 48, num_classes=MAX_CLASSES, batch_size=BATCH_SIZE
    )
    for source in ("w8", "w8a8", "grouped4"):
        coreml_multifunction.merge(paths[source], paths["train"], paths[f"{source}_train"], board=board_of_ios(18))
    return paths


def write_artifacts(directory: Path) -> None:
    """Convert to every format; tests call it here and in a second process, and compare."""
    from converters import coreml, tflite

    model = make_model()
    float32 = tflite.convert_float(model, INPUT_SHAPE, MAX_CLASSES, directory / "float32.tflite", input_spec=INPUT_SPEC)
    tflite.quantize_static(float32, make_images(48)[:32], directory / "static.tflite")
    tflite.halve_weights(float32, directory / "float16.tflite")
    tflite.quantize_dynamic(float32, directory / "dynamic.tflite")
    package = directory / "model.mlpackage"
    coreml.convert(model, INPUT_SHAPE, package, input_spec_metadata=INPUT_SPEC, labels=LABELS)
    write_coreml_forms(model, package, directory)
