"""Latency of every full-size model in LiteRT against MobileNetV2 x1.4 and ResNet-50; the table `latency_families`.

    python -m bench.latency_families [--only PART_OF_A_NAME]

Each model is converted to float32 TFLite (image to logits, inference form) and run on one thread in turn with both
peers, so a slow moment of the machine is shared; ratios are of medians taken in the same minutes. Times are those of
the processor, which equal a clock's on an idle machine and do not count what others do on a shared one. The peers are
timm's, in the same inference form. Weights are random: they do not change the time. Resumable (`bench.jobs`).
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from bench.jobs import Job, Table, digest_code, run_jobs
from bench.record import Row
from converters.gates import assert_builtin_ops, partitions
from converters.prepare import DeployClassifier
from converters.quiet import quiet
from host.models import registry
from host.models.entry import ModelEntry
from host.models.timm_classifier import TimmClassifier

PEERS = {"MobileNetV2 x1.4": "mobilenetv2_140", "ResNet-50": "resnet50"}
PEER_SIZE, NUM_CLASSES = 224, 1000
WARM_UP, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 20, 100, 20.0
MODELS = Path(registry.__file__).parent
SOURCES = {"gcab": ("gcab", "gated_attention", "convit"), "deit": ("deit", "vit_widths"), "mobilevitv2": ("mobilevit",)}
"""Families whose model is not just in the file of their own name."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only models whose name holds this")
    only = parser.parse_args(arguments).only
    torch.set_num_threads(1)
    table = Table(
        name="latency_families",
        command="python -m bench.latency_families",
        data="one random image per model",
        title="Latency in LiteRT, float32, one thread, processor time",
        notes=_notes,
    )
    with tempfile.TemporaryDirectory() as directory:
        peers = _convert_peers(Path(directory))
        run_jobs(table, list_jobs(), partial(measure, peers=peers, directory=Path(directory)), only=only)
    return 0


def list_jobs() -> list[Job]:
    """One per published variant."""
    return [
        Job(key={"model": entry.name}, settings={"peers": PEERS}, defined_by=digest_code(*sources(entry)))
        for entry in registry.list_models()
        if entry.is_exact
    ]


def measure(job: Job, *, peers: Mapping[str, Path], directory: Path) -> Row:
    """Convert one model and run it in turn with the peers."""
    entry = registry.find_model(*str(job.key["model"]).split("/"))
    path, started = directory / "model.tflite", time.perf_counter()
    convert(entry.create().deploy(), entry.image_size, entry.in_chans, path)
    convert_s = time.perf_counter() - started
    assert_builtin_ops(path)
    times = interleaved({"model": runner(path), **{name: runner(peer) for name, peer in peers.items()}})
    counts, (delegated, outside) = operators(path), partitions(path)
    return {
        "input": f"{entry.in_chans} x {entry.image_size} x {entry.image_size}",
        "macs_millions": round(entry.macs / 1e6, 1),
        "file_mb": round(path.stat().st_size / 1e6, 1),
        "p50_ms": round(times["model"], 2),
        **{f"ratio_to_{name}": round(times["model"] / times[name], 3) for name in peers},
        **{f"{name}_p50_ms": round(times[name], 2) for name in peers},
        "operators": counts.total(),
        "most_frequent": ", ".join(f"{count} {name}" for name, count in counts.most_common(6)),
        "partitions": delegated,
        "outside_xnnpack": ", ".join(f"{count} {name}" for name, count in outside.most_common()) or None,
        "convert_s": round(convert_s, 1),
    }


def convert(model: nn.Module, image_size: int, in_chans: int, path: Path) -> None:
    """Image to logits, float32 [1, H, W, C] in."""
    with quiet():
        import litert_torch

        image = torch.zeros(1, image_size, image_size, in_chans)
        litert_torch.convert(DeployClassifier(model).eval(), (image,)).export(str(path))


def runner(path: Path) -> Callable[[], float]:
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


def interleaved(runners: Mapping[str, Callable[[], float]]) -> dict[str, float]:
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


def _convert_peers(directory: Path) -> dict[str, Path]:
    import timm

    paths = {}
    for name, timm_name in PEERS.items():
        backbone = timm.create_model(timm_name, num_classes=0)
        peer = TimmClassifier(backbone, image_size=PEER_SIZE, num_classes=NUM_CLASSES).eval()
        paths[name] = directory / f"{timm_name}.tflite"
        convert(peer.deploy(), PEER_SIZE, 3, paths[name])
    return paths


def sources(entry: ModelEntry) -> list[Path]:
    """The files that define a model and its inference form."""
    names = (*SOURCES.get(entry.family, (entry.family,)), "deploy", "heads", "timm_classifier")
    return [MODELS / f"{name}.py" for name in names]


def _notes(rows: Sequence[Row]) -> str:
    return (
        "Ratios above 1 are slower than the peer. Peers were measured anew beside every model, in turn with it. One "
        "thread of an x86 machine: it says nothing about a phone's neural engine, on which the papers' latencies were "
        f"measured, nor about ARM. {len(rows)} of {len(list_jobs())} models are measured with the present code."
    )


if __name__ == "__main__":
    sys.exit(main())
