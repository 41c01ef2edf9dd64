"""Our TFLite files against the stock route's and onnxruntime, same weights, in turn; the table `conversion_speed`.

    python -m bench.conversion_speed [--only PART_OF_A_NAME]

`bench.conversion_artifacts` says how each file is made. All files of a model then run in turn as `fieldvit bench` runs
them: one query each, on one thread, so a slow moment of the machine is shared; times are those of the processor, which on
a shared machine leave out waiting for others. Weights are random with every branch open: they do not change the time,
and the float files must agree on photos before they are timed. Resumable (`bench.jobs`).

The control is a second copy of our float file: what two equal files may differ by. Intervals are of the ratio of
medians, bootstrapped over rounds. `share_of_peak` is what a large convolution reaches in the same runtime in the same
run: multiply-accumulates per second of the file over those of the convolution, float32 or int8 as the file computes.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.conversion_artifacts import ROUTES, file_of, our_model, test_images
from bench.jobs import Job, Table, main_of
from bench.record import Row
from bench.sources import digest_of, module_of
from converters import gates, tflite
from converters.flatbuffer import FEATURES
from converters.macs import macs_by_type
from converters.parity import compare
from host.bench.measure import Extent, measure
from host.bench.process import Worker
from host.bench.runtimes import Subject
from host.bench.statistics import ratio_of_medians
from host.errors import HostError
from host.models.registry import find_model

MODELS = ("efficientformer/l1", "efficientformerv2/s0", "nextvit/s", "deit/tiny", "mobilevit/s", "mobilevitv2/100")
ROUNDS = 220
MIN_COSINE = 0.9999
"""Between the logits of any two float files; else they do not compute the same."""
RECIPE: Mapping[str, Any] = {"version": 1, "rounds": ROUNDS}
"""Raise the version when the measuring below changes in effect: everything is measured again."""
PAIRS = {"float32": ("ours", "stock", "onnx"), "int8": ("ours-int8", "stock-int8", "onnx-qdq")}
CONTROL, PEAK = "control", {"float32": "peak", "int8": "peak-int8"}
PEAK_SIZE, PEAK_WIDTH = 56, 256


def main(argv: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    table = Table(
        name="conversion_speed",
        command="python -m bench.conversion_speed",
        seed=0,
        data="crops of the two photographs that ship with scikit-learn; weights drawn at random",
        title="TFLite files against the stock route and onnxruntime, one thread",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure_model, argv, is_timed=True)


def list_jobs() -> list[Job]:
    """One per model, with a row for each precision."""
    return [
        Job(
            key={"model": name},
            settings=RECIPE,
            defined_by=digest_of(
                module_of(find_model(*name.split("/"))), "converters.tflite", "bench.conversion_artifacts"
            ),
        )
        for name in MODELS
    ]


def measure_model(job: Job) -> list[Row]:
    """Make all files of one model, check that the float ones agree, and time them in turn."""
    name = str(job.key["model"])
    entry = find_model(*name.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        costs = {route: build(route, name, directory) for route in ROUTES}
        files = {route: file_of(route, directory) for route in ROUTES if costs[route] and route != "weights"}
        require_agreement(name, directory, files)
        files |= {CONTROL: files["ours"], **write_peak(directory)}
        times = run_in_turn(files)
        return [_row(precision, entry.macs, files, costs, times) for precision in PAIRS]


def build(route: str, name: str, directory: Path) -> Mapping[str, float]:
    """What making a file cost; empty where the route refuses the model."""
    command = [sys.executable, "-m", "bench.conversion_artifacts", route, name, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        cost: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return cost
    if route.startswith("ours") or route == "weights":
        raise HostError(f"{name}: {route} failed: {done.stderr.strip().splitlines()[-1:]}")
    return {}


def require_agreement(name: str, directory: Path, files: Mapping[str, Path]) -> None:
    """All float files give the logits of our model in PyTorch, on photos."""
    entry = find_model(*name.split("/"))
    images = test_images(entry)
    model = our_model(entry, directory)
    with torch.no_grad():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    for route in PAIRS["float32"]:
        found = logits_of(files[route], images, model.head) if route in files else expected
        cosine = compare(expected, found).min_cosine
        if not cosine >= MIN_COSINE:
            raise HostError(f"{name}: the file of route {route} computes something else: cosine {cosine:.6f}")


def logits_of(path: Path, images: np.ndarray, head: nn.Module) -> np.ndarray:
    """Logits [N, K] of a float file for images [N, H, W, C]; ours gives features, which `head` completes."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images.transpose(0, 3, 1, 2)])
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    is_ours = FEATURES in interpreter.get_signature_list()
    runner = interpreter.get_signature_runner(FEATURES if is_ours else None)
    (argument,) = runner.get_input_details()
    outputs = np.concatenate([next(iter(runner(**{argument: image[None]}).values())) for image in images])
    with torch.no_grad():
        return head(torch.from_numpy(outputs)).numpy() if is_ours else outputs


def run_in_turn(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """Processor seconds [ROUNDS] of each file, one query at a time on random input, each in a process of its own."""
    with ExitStack() as stack:
        subjects = [
            Subject(name=name, path=path, runtime=path.suffix.removeprefix(".")) for name, path in files.items()
        ]
        workers = [stack.enter_context(Worker(subject)) for subject in subjects]
        times, _ = measure(workers, Extent(queries=ROUNDS), report=lambda share, queries: None)
    return {name: found.processor for name, found in zip(files, times, strict=True)}


class _PeakConvolution(nn.Module):
    """A convolution of 3 x 3 that is as large as a runtime could wish, in the form that converters take."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(PEAK_WIDTH, PEAK_WIDTH, 3, padding=1)
        self.head = nn.Identity()

    def forward_features(self, images_nchw: torch.Tensor) -> torch.Tensor:
        return self.convolution(images_nchw).mean((2, 3))


def write_peak(directory: Path) -> dict[str, Path]:
    """The large convolution in float32 and in int8."""
    torch.manual_seed(0)
    shape = (1, PEAK_SIZE, PEAK_SIZE, PEAK_WIDTH)
    paths = {name: directory / f"{name}.tflite" for name in PEAK.values()}
    tflite.convert_float(_PeakConvolution(), shape, 2, paths[PEAK["float32"]])
    images = np.random.default_rng(0).standard_normal((4, *shape[1:]), dtype=np.float32)
    tflite.quantize_static(paths[PEAK["float32"]], images, paths[PEAK["int8"]])
    return paths


def _row(
    precision: str,
    macs: int,
    files: Mapping[str, Path],
    costs: Mapping[str, Mapping[str, float]],
    times: Mapping[str, np.ndarray],
) -> Row:
    ours, stock, other = PAIRS[precision]
    medians = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
    delegated, outside = gates.partitions(files[ours])
    counts = macs_by_type(files[ours])
    peak_macs = PEAK_SIZE**2 * PEAK_WIDTH**2 * 9
    share = (macs / medians[ours]) / (peak_macs / medians[PEAK[precision]])
    interval = ratio_of_medians(times[ours], times[stock]) if stock in times else None
    return {
        "precision": precision,
        "ours_ms": round(medians[ours], 2),
        "stock_ms": _rounded(medians.get(stock), 2),
        "onnxruntime_ms": _rounded(medians.get(other), 2),
        "ratio_to_stock": _ratio(medians, ours, stock),
        "ratio_low": interval and round(interval.low, 3),
        "ratio_high": interval and round(interval.high, 3),
        "ratio_to_onnxruntime": _ratio(medians, ours, other),
        "ratio_to_own_float32": _ratio(medians, ours, "ours"),
        "ratio_of_control": _ratio(medians, CONTROL, "ours"),
        "share_of_peak": round(share, 3),
        "partitions_ours": delegated,
        "outside_ours": ", ".join(f"{count} {name}" for name, count in outside.most_common()) or None,
        "partitions_stock": gates.partitions(files[stock])[0] if stock in files else None,
        "integer_macs": round(counts["INT8"] / counts.total(), 3),
        "bytes_share": round(files[ours].stat().st_size / files["ours"].stat().st_size, 3),
        **{
            f"{who}_{what}": costs[route].get(what)
            for who, route in (("ours", ours), ("stock", stock))
            for what in ("cpu_s", "peak_mb")
        },
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _ratio(medians: Mapping[str, float], name: str, reference: str) -> float | None:
    return round(medians[name] / medians[reference], 3) if {name, reference} <= medians.keys() else None


def _notes(rows: Sequence[Row]) -> str:
    def mean_of(precision: str, column: str, models: Sequence[str] = MODELS) -> str:
        values = [row[column] for row in rows if row["precision"] == precision and row["model"] in models]
        found = [value for value in values if value]
        if not found:
            return "–"
        return f"{geometric_mean(found):.3f} (highest {max(found):.3f}, {len(found)} of {len(models)} models)"

    return f"""Geometric means over the models, and the bound that each is held to:

- float32, ours to the stock route: {mean_of("float32", "ratio_to_stock")}; 0.95, and 1.02 for each
- int8 to our own float32: {mean_of("int8", "ratio_to_own_float32")}; 1.00, and 1.05 for each
- int8 of deit/tiny to the stock route's int8: {mean_of("int8", "ratio_to_stock", ["deit/tiny"])}; 0.60
- to onnxruntime: float32 {mean_of("float32", "ratio_to_onnxruntime")}, int8 {mean_of("int8", "ratio_to_onnxruntime")}; 1.00
- processor time of the conversion, ours to stock: float32 {_cost(rows, "cpu_s")}; 1.30
- peak memory of the conversion, ours to stock: float32 {_cost(rows, "peak_mb")}; 1.30

`ratio_low` and `ratio_high`: 95 % interval of `ratio_to_stock`. `ratio_of_control`: a second copy of our float file to
the first. `integer_macs`: share of the multiply-accumulates in integer kernels; `bytes_share`: of our float file's bytes.
An empty cell: the stock route or onnxruntime refuses the model."""


def _cost(rows: Sequence[Row], what: str) -> str:
    ratios = [row[f"ours_{what}"] / row[f"stock_{what}"] for row in rows if row["precision"] == "float32"]
    return f"{geometric_mean(ratios):.2f} (highest {max(ratios):.2f})" if ratios else "–"


if __name__ == "__main__":
    sys.exit(main())
