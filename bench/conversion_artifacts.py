"""One model through one route into one file, in a process of its own: what `conversion_speed` compares.

    python -m bench.conversion_artifacts ROUTE FAMILY/VARIANT DIRECTORY

Prints one JSON line: processor seconds and peak memory of the conversion alone, imports and model included. All routes
start from the same weights, `weights.safetensors` in the directory, which the route `weights` writes: timm's model with
every branch open (`bench.probes.randomize`), norms settled on photos.

Routes: `ours` and `ours-int8` are this project's. `stock` is litert-torch on timm's unmodified model with channels last,
`stock-int8` ai-edge-quantizer's static recipe on that file. `onnx` is PyTorch's exporter, `onnx-qdq` onnxruntime's static
quantization of it. Only MobileViTv2 needs a patch to pass the stock route: `expand_as` there does nothing.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import host.models  # noqa: F401  # repairs torchvision, which timm imports

# isort: split
import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.probes import photo_crops, randomize, settle_norms
from converters import tflite
from converters.quiet import quiet
from host.memory import own_peak_bytes
from host.models.entry import ModelEntry
from host.models.pretrained import load_pretrained
from host.models.registry import find_model

CALIBRATION_IMAGES, TEST_IMAGES = 32, 16
NUM_CLASSES = 1000
_WEIGHTS = "weights.safetensors"

Route = Callable[[ModelEntry, Path], None]


def file_of(route: str, directory: Path) -> Path:
    """Where a route writes its file."""
    return directory / f"{route}.{'onnx' if route.startswith('onnx') else 'tflite'}"


def calibration_images(entry: ModelEntry) -> np.ndarray:
    """Photos float32 [N, H, W, C] that int8 ranges are taken from."""
    return photo_crops(entry.image_size, entry.in_chans, count=CALIBRATION_IMAGES, seed=0)


def test_images(entry: ModelEntry) -> np.ndarray:
    """Other photos, float32 [N, H, W, C]."""
    return photo_crops(entry.image_size, entry.in_chans, count=TEST_IMAGES, seed=1)


def _write_weights(entry: ModelEntry, directory: Path) -> None:
    images_nchw = torch.from_numpy(calibration_images(entry)[:8]).permute(0, 3, 1, 2)
    model = settle_norms(randomize(timm.create_model(entry.timm_name)), images_nchw)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / _WEIGHTS)


def stock_model(entry: ModelEntry, directory: Path) -> nn.Module:
    """Timm's own, with the weights that all routes share."""
    model = timm.create_model(entry.timm_name)
    model.load_state_dict(load_file(directory / _WEIGHTS))
    return model.eval()


def our_model(entry: ModelEntry, directory: Path) -> nn.Module:
    """Ours in its inference form, with the same weights."""
    model = entry.create()
    load_pretrained(model, entry, directory / _WEIGHTS)
    return model.eval().deploy()


def _ours(entry: ModelEntry, directory: Path) -> None:
    shape = (1, entry.image_size, entry.image_size, entry.in_chans)
    tflite.convert_float(our_model(entry, directory), shape, NUM_CLASSES, file_of("ours", directory))


def _ours_int8(entry: ModelEntry, directory: Path) -> None:
    tflite.quantize_static(
        file_of("ours", directory),
        calibration_images(entry),
        file_of("ours-int8", directory),
        float_scopes=entry.float_scopes,
    )


def _stock(entry: ModelEntry, directory: Path) -> None:
    with quiet(), _patched(entry):
        import litert_torch

        model = litert_torch.to_channel_last_io(stock_model(entry, directory), args=[0]).eval()
        image = torch.zeros(1, entry.image_size, entry.image_size, entry.in_chans)
        litert_torch.convert(model, (image,)).export(str(file_of("stock", directory)))


@contextmanager
def _patched(entry: ModelEntry) -> Iterator[None]:
    """The smallest change with which the stock route takes the model: none, but for MobileViTv2."""
    if entry.family != "mobilevitv2":
        yield
        return
    with mock.patch.object(torch.Tensor, "expand_as", lambda tensor, other: tensor):
        yield


def _stock_int8(entry: ModelEntry, directory: Path) -> None:
    with quiet():
        from ai_edge_quantizer import quantizer, recipe

        stock = quantizer.Quantizer(str(file_of("stock", directory)), recipe.static_wi8_ai8())
        samples = [{"args_0": image[None]} for image in calibration_images(entry)]
        ranges = stock.calibrate({"serving_default": samples}, num_threads=1)
        stock.quantize(ranges).export_model(str(file_of("stock-int8", directory)), overwrite=True)


def _onnx(entry: ModelEntry, directory: Path) -> None:
    with quiet():
        image = torch.zeros(1, entry.in_chans, entry.image_size, entry.image_size)
        program = torch.onnx.export(stock_model(entry, directory), (image,), dynamo=True, input_names=["image"])
        program.save(str(file_of("onnx", directory)))


def _onnx_qdq(entry: ModelEntry, directory: Path) -> None:
    with quiet():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Photos(CalibrationDataReader):
            def __init__(self) -> None:
                self.images = iter(calibration_images(entry))

            def get_next(self) -> Mapping[str, np.ndarray] | None:
                image = next(self.images, None)
                return None if image is None else {"image": image.transpose(2, 0, 1)[None]}

        prepared = directory / "prepared.onnx"
        quant_pre_process(str(file_of("onnx", directory)), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(file_of("onnx-qdq", directory)),
            Photos(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )


ROUTES: Mapping[str, Route] = {
    "weights": _write_weights,
    "ours": _ours,
    "stock": _stock,
    "onnx": _onnx,
    "ours-int8": _ours_int8,
    "stock-int8": _stock_int8,
    "onnx-qdq": _onnx_qdq,
}
"""In an order in which each finds what it starts from."""


def main() -> int:
    torch.set_num_threads(1)
    route, name, directory = sys.argv[1:]
    ROUTES[route](find_model(*name.split("/")), Path(directory))
    print(json.dumps({"cpu_s": round(time.process_time(), 1), "peak_mb": round(own_peak_bytes() / 1e6)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
