"""Two converters that share nothing, on the small variant of every family: do they make the same of it? The table `two_routes`.

    python -m bench.two_routes [--only PART_OF_A_NAME]

Ours goes by litert-torch, the other by ONNX, onnx2tf and TensorFlow's converter (`converters.second_route`; needs
`make onnx2tf-env`). Both start from the model's `deploy()`, with random weights that hide nothing and statistics of batch norms
from the photographs, and run in LiteRT. A difference beyond rounding would be a mistake of one of them. Resumable (`bench.jobs`).
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.jobs import Job, Table, main_of
from bench.probes import photo_crops, randomize, settle_norms
from bench.record import Row
from bench.sources import digest_of, module_of
from converters import flatbuffer, gates, second_route, tflite
from converters.environments import ONNX2TF
from converters.errors import ConversionError, MissingEnvironmentError
from converters.isolate import opened
from converters.runners import open_features, open_outputs
from host.errors import BenchError
from host.models.entry import ModelEntry
from host.models.registry import find_model

SMALL = (
    "efficientformer/field-32",
    "efficientformerv2/field-64",
    "nextvit/field-32",
    "ninformer/field-32",
    "mobilevit/field-32",
    "mobilevitv2/field-32",
    "mobileformer/field-32",
    "deit/field-32",
    "gcab/field-32",
    "cnn/small",
    "resnet-cifar/20",
)
NUM_PHOTOS = 32
LIMIT = 1e-4
"""What two routes may differ by, as a share of the largest value."""
ERROR_LENGTH = 200
RECIPE: Mapping[str, Any] = {"version": 1, "photos": NUM_PHOTOS}
"""Raise the version when the comparison below changes in effect: everything is measured again."""
MEASURED_BY = ("bench.probes", "converters.second_route", "converters.tflite", "converters.runners", "device.engine")


def main(argv: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    table = Table(
        name="two_routes",
        command="python -m bench.two_routes",
        seed=0,
        data=f"{NUM_PHOTOS} crops of the two photographs that ship with scikit-learn",
        title="The same models by litert-torch and by onnx2tf",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv, prepare=require_second_route)


def require_second_route() -> None:
    """Raise BenchError where the second route is not installed: every row would say only that."""
    try:
        ONNX2TF.require()
    except MissingEnvironmentError as error:
        raise BenchError(str(error)) from error


def list_jobs() -> list[Job]:
    return [
        Job(
            key={"model": name},
            settings=RECIPE,
            defined_by=digest_of(module_of(find_model(*name.split("/"))), *MEASURED_BY),
        )
        for name in SMALL
    ]


def measure(job: Job) -> Row:
    """Convert one model by both routes, and compare their features and logits with each other and with PyTorch."""
    entry = find_model(*str(job.key["model"]).split("/"))
    model, images = probe(entry)
    answers = {"torch": torch_answers(model, images)}
    row: Row = {}
    with tempfile.TemporaryDirectory() as name:
        for route, convert in (("litert", by_litert), ("onnx2tf", by_onnx2tf)):
            path, start = Path(name) / f"{route}.tflite", time.perf_counter()
            try:
                answers[route] = convert(model.deploy(), entry, images, path)
            except ConversionError as error:
                row |= {route: f"refused: {' '.join(str(error).split())[:ERROR_LENGTH]}"}
                continue
            seconds = time.perf_counter() - start
            row |= {route: "converts", f"{route}_seconds": round(seconds), **file_facts(path, route)}
    pairs = {
        "routes": ("litert", "onnx2tf"),
        "litert_torch": ("torch", "litert"),
        "onnx2tf_torch": ("torch", "onnx2tf"),
    }
    for column, (one, other) in pairs.items():
        if one in answers and other in answers:
            row |= {f"{column}_{key}": difference(answers[one][key], answers[other][key]) for key in answers["torch"]}
    agrees = "routes_features" in row and max(row["routes_features"], row["routes_logits"]) <= LIMIT
    return {**row, "verdict": "agree" if agrees else "differ" if "routes_features" in row else "one route only"}


def probe(entry: ModelEntry) -> tuple[nn.Module, np.ndarray]:
    """A model in its training form with weights that hide nothing, and photographs [N, H, W, C]."""
    images = photo_crops(entry.image_size, entry.in_chans, count=NUM_PHOTOS, seed=0)
    model = settle_norms(randomize(entry.create()), torch.from_numpy(images).permute(0, 3, 1, 2))
    return model, images


Answers = dict[str, np.ndarray]
"""`features` [N, D] and `logits` [N, K]."""


@torch.no_grad()
def torch_answers(model: nn.Module, images: np.ndarray) -> Answers:
    """What PyTorch says, image by image as the files are asked."""
    features = torch.cat(
        [model.forward_features(image[None]) for image in torch.from_numpy(images).permute(0, 3, 1, 2)]
    )
    return {"features": features.numpy(), "logits": model.head(features).numpy()}


@torch.no_grad()
def by_litert(deployed: nn.Module, entry: ModelEntry, images: np.ndarray, path: Path) -> Answers:
    """The main route: the file's features, and the model's head on them in PyTorch, for the file has none of its own."""
    tflite.convert_float(deployed, _shape(entry), entry.num_classes, path)
    gates.assert_builtin_ops(path)
    with opened(open_features, path) as features_of:
        features = features_of(images)
    return {"features": features, "logits": deployed.head(torch.from_numpy(features)).numpy()}


def by_onnx2tf(deployed: nn.Module, entry: ModelEntry, images: np.ndarray, path: Path) -> Answers:
    """The second route, with the head in the file."""
    second_route.convert_classifier(deployed, _shape(entry), path)
    with opened(open_outputs, path) as outputs_of:
        return outputs_of(images)


def file_facts(path: Path, route: str) -> Row:
    """Bytes, and operations of the graph that holds the backbone."""
    operators = flatbuffer.operators(path)
    count = operators.get(flatbuffer.FEATURES) or operators[flatbuffer.INFER]
    return {f"{route}_bytes": path.stat().st_size, f"{route}_operators": count.total()}


def difference(reference: np.ndarray, outputs: np.ndarray) -> float:
    """The largest, as a share of the reference's largest value; two digits."""
    return float(f"{float(np.abs(outputs - reference).max() / np.abs(reference).max()):.1e}")


def _shape(entry: ModelEntry) -> tuple[int, int, int, int]:
    return (1, entry.image_size, entry.image_size, entry.in_chans)


def _notes(rows: Sequence[Row]) -> str:
    both = [row for row in rows if "routes_features" in row]
    largest = max((max(row["routes_features"], row["routes_logits"]) for row in both), default=0.0)
    agree = sum(row["verdict"] == "agree" for row in both)
    return f"""{len(both)} of {len(rows)} models convert by both routes, {agree} of them agree within {LIMIT:g}; the largest difference is
{largest:.1e}. `routes_...`: the largest difference between the two files' outputs in LiteRT, as a share of the largest
output; `litert_torch_...` and `onnx2tf_torch_...`: the same between each file and PyTorch. `seconds`: conversion and {NUM_PHOTOS}
inferences on a shared machine, an order of magnitude. `operators`: of the backbone's graph, the second route's with the head.
The main route's logits are PyTorch's head on the file's features: boards keep their head apart. MobileViTv2's norms over two axes
are flattened in the ONNX file (`converters.onnx_export.flatten_layer_norms`); onnx2tf would normalize over one of them."""


if __name__ == "__main__":
    sys.exit(main())
