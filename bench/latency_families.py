"""Latency of every full-size model in LiteRT against MobileNetV2 x1.4 and ResNet-50; the table `latency_families`.

    python -m bench.latency_families [--only PART_OF_A_NAME]

Each model is converted to float32 TFLite (image to logits, inference form) and run on one thread in turn with both
peers, so a slow moment of the machine is shared; ratios are of medians taken in the same minute. Times are those of
the processor: on an idle machine they equal a clock's, and on a shared one they leave out waiting for others, though
not what these do to caches and clock rate. Every run follows that of another model, so its weights come from memory.
The peers are timm's, in the same inference form. Weights are random: they do not change the time. Resumable
(`bench.jobs`).
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.jobs import Job, Table, main_of
from bench.record import Row
from bench.sources import digest_of, module_of
from converters.gates import assert_builtin_ops, partitions
from converters.prepare import DeployClassifier
from converters.quiet import quiet
from host.models.registry import find_model, list_models
from host.models.timm_classifier import TimmClassifier

PEERS = {"MobileNetV2 x1.4": "mobilenetv2_140", "ResNet-50": "resnet50"}
PEER_SIZE, NUM_CLASSES = 224, 1000
WARM_UP, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 20, 100, 20.0
RECIPE: Mapping[str, Any] = {
    "version": 2,
    "peers": PEERS,
    "peer_size": PEER_SIZE,
    "rounds": [WARM_UP, MIN_ROUNDS, MAX_ROUNDS, SECONDS],
}
"""Raise the version when the measuring below changes in effect: everything is measured again."""

Runner = Callable[[], float]


def main(argv: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    table = Table(
        name="latency_families",
        command="python -m bench.latency_families",
        seed=0,
        data="one random image per model",
        title="Latency in LiteRT, float32, one thread, processor time",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv, is_timed=True)


def list_jobs() -> list[Job]:
    """One per published variant."""
    return [
        Job(
            key={"model": entry.name},
            settings=RECIPE,
            defined_by=digest_of(module_of(entry), "converters.prepare"),
        )
        for entry in list_models()
        if entry.is_exact
    ]


def measure(job: Job) -> Row:
    """Convert one model and run it in turn with the peers."""
    entry = find_model(*str(job.key["model"]).split("/"))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        path, started = Path(directory) / "model.tflite", time.process_time()
        convert(entry.create().deploy(), entry.image_size, entry.in_chans, path)
        convert_s = time.process_time() - started
        assert_builtin_ops(path)
        times = interleaved({"model": runner(path), **peers()})
        counts, (delegated, outside) = operators(path), partitions(path)
        file_bytes = path.stat().st_size
    return {
        "input": f"{entry.in_chans} x {entry.image_size} x {entry.image_size}",
        "macs_millions": round(entry.macs / 1e6, 1),
        "file_mb": round(file_bytes / 1e6, 1),
        "p50_ms": round(times["model"], 2),
        **{f"ratio_to_{name}": round(times["model"] / times[name], 3) for name in PEERS},
        **{f"{name}_p50_ms": round(times[name], 2) for name in PEERS},
        "operators": counts.total(),
        "most_frequent": ", ".join(f"{count} {name}" for name, count in counts.most_common(6)),
        "partitions": delegated,
        "outside_xnnpack": ", ".join(f"{count} {name}" for name, count in outside.most_common()) or None,
        "convert_cpu_s": round(convert_s, 1),
    }


@cache
def peers() -> Mapping[str, Runner]:
    """Both peers by name, converted once per process."""
    import timm

    found = {}
    for name, timm_name in PEERS.items():
        backbone = timm.create_model(timm_name, num_classes=0)
        model = TimmClassifier(backbone, image_size=PEER_SIZE, num_classes=NUM_CLASSES).eval()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{timm_name}.tflite"
            convert(model.deploy(), PEER_SIZE, 3, path)
            found[name] = runner(path)
    return found


def convert(model: nn.Module, image_size: int, in_chans: int, path: Path) -> None:
    """Image to logits, float32 [1, H, W, C] in."""
    with quiet():
        import litert_torch

        image = torch.zeros(1, image_size, image_size, in_chans)
        litert_torch.convert(DeployClassifier(model).eval(), (image,)).export(str(path))


def runner(path: Path) -> Runner:
    """Runs a file once on a random image and gives the milliseconds of processor time that took."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    detail = interpreter.get_input_details()[0]
    image = np.random.default_rng(0).standard_normal(detail["shape"], dtype=np.float32)

    def run() -> float:
        interpreter.set_tensor(detail["index"], image)
        started = time.process_time()
        interpreter.invoke()
        return (time.process_time() - started) * 1e3

    return run


def interleaved(runners: Mapping[str, Runner]) -> dict[str, float]:
    """Median milliseconds of each, all run in turn for `SECONDS`, at least `MIN_ROUNDS` times."""
    for run in runners.values():
        for _ in range(WARM_UP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    started = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > SECONDS:
            break
        for name, run in runners.items():
            times[name].append(run())
    return {name: median(values) for name, values in times.items()}


def operators(path: Path) -> Counter[str]:
    """The file's own operations, as they were before a delegate took them."""
    from ai_edge_litert.interpreter import Interpreter

    return Counter(op["op_name"] for op in Interpreter(model_path=str(path), num_threads=1)._get_ops_details())


def _notes(rows: Sequence[Row]) -> str:
    return (
        f"Ratios above 1 are slower than the peer. Peers were measured anew beside every model, in turn with it, at "
        f"{PEER_SIZE} x {PEER_SIZE} pixels whatever the model's input is. One thread of an x86 machine: it says nothing "
        "about a phone's neural engine, on which the papers' latencies were measured, nor about ARM. `operators`: those "
        "of the file, before XNNPACK takes them in `partitions` parts. The padding of ResNet-50's pool stays outside "
        f"XNNPACK. {len(rows)} of {len(list_jobs())} models are measured with the present code."
    )


if __name__ == "__main__":
    sys.exit(main())
