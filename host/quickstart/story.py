"""The report and the terminal summary of a quickstart."""

from pathlib import Path
from typing import Any

import numpy as np

from device.contract.files import write_atomic
from device.contract.manifest import Manifest
from host.data.splits import ImageSplits
from host.quickstart.field import LABELS_PER_CLASS, Answers, FieldRecord
from host.quickstart.metrics import confusion, truth
from host.report import charts
from host.report.page import Headline, Section, render

REPORT = "report.html"
SAMPLES = 30


def write_report(
    directory: Path, *, manifest: Manifest, split: ImageSplits, record: FieldRecord, metrics: dict[str, Any]
) -> Path:
    """Write the self-contained page; returns its path."""
    page = render(
        title="FieldViT quickstart",
        subtitle=(
            "A vision transformer trained, distilled, quantized, converted, proved equal, signed, flashed, taught and attacked. "
            f"Real data: scikit-learn's handwritten digits. Answers come from the board's process, on {len(split.test.labels)} test "
            "images that no choice was made on."
        ),
        headlines=_headlines(metrics),
        sections=[
            _accuracy(metrics, split),
            _artifacts(manifest, metrics),
            Section(
                title="What the board answered",
                text="Test images, and the answer before and after the field lesson; green is right.",
                picture=_samples(split, record.int8_before, record.int8_after),
                alt="Digits with the board's answers before and after learning",
            ),
            Section(
                title="Confusion before and after",
                text=f"The operator named {LABELS_PER_CLASS} frames each of 8 and 9 by frame id. The learner is given features, never images.",
                picture=charts.confusion_matrices(
                    split.label_names, confusion(record.int8_before, split), confusion(record.int8_after, split)
                ),
                alt="Two confusion matrices over ten digits",
            ),
            Section(
                title="Latency on this machine",
                text="One thread, one frame at a time, in the device process.",
                picture=charts.latency_histogram(
                    {"int8": record.int8_after.latencies_ms, "float32": record.float_before.latencies_ms}
                ),
                alt="Histogram of milliseconds per frame",
            ),
            _bad_updates(record),
            _timeline(record),
        ],
        footer=_footer(manifest, metrics),
    )
    path = directory / REPORT
    write_atomic(path, page.encode())
    return path


def summary(metrics: dict[str, Any], report: Path) -> str:
    """Ten lines for the terminal."""
    latency = metrics["latency_ms"]
    return "\n".join(
        [
            "FieldViT quickstart: the loop is closed",
            f"  float32 on the board     {metrics['base_accuracy_float']:7.2%}   of the test images of 8 known classes",
            f"  int8 on the board        {metrics['base_accuracy_int8']:7.2%}   p50 {latency['int8']['p50']:.2f} ms (float32 {latency['float32']['p50']:.2f} ms)",
            f"  TFLite equals PyTorch    {metrics['tflite_argmax_agreement']:7.2%}   float32, answers on test images",
            f"  Core ML equals PyTorch   {metrics['coreml_argmax_agreement']:7.2%}   float16, evaluated from the saved program",
            f"  ten classes, before      {metrics['all_accuracy_before']:7.2%}   8 and 9 are unknown to the board",
            f"  ten classes, after       {metrics['all_accuracy_after']:7.2%}   {LABELS_PER_CLASS} + {LABELS_PER_CLASS} labels; it keeps features, no image",
            f"  old classes, change      {-100 * metrics['old_classes_drop']:+7.2f}   points of accuracy",
            f"  bad updates refused      {metrics['bad_updates_refused']:7.2%}   wrong key, damaged, broken inside",
            f"  {metrics['seconds']:.0f} s; report: {report}",
        ]
    )


def _headlines(metrics: dict[str, Any]) -> list[Headline]:
    drop = metrics["old_classes_drop"]
    return [
        Headline(
            value=f"{metrics['base_accuracy_int8']:.1%}",
            caption="int8 on 8 known classes",
            good=metrics["base_accuracy_int8"] >= 0.98,
        ),
        Headline(
            value=f"{metrics['all_accuracy_after']:.1%}",
            caption="ten classes after the lesson",
            good=metrics["all_accuracy_after"] >= 0.94,
        ),
        Headline(value=f"{-100 * drop:+.1f} pt", caption="change on old classes", good=drop <= 0.01),
        Headline(
            value=f"{metrics['tflite_argmax_agreement']:.1%}",
            caption="TFLite answers as PyTorch",
            good=metrics["tflite_argmax_agreement"] == 1,
        ),
        Headline(
            value=f"{metrics['coreml_argmax_agreement']:.1%}",
            caption="Core ML answers as PyTorch",
            good=metrics["coreml_argmax_agreement"] >= 0.995,
        ),
        Headline(
            value=f"{metrics['bad_updates_refused']:.0%}",
            caption="bad updates refused",
            good=metrics["bad_updates_refused"] == 1,
        ),
    ]


def _accuracy(metrics: dict[str, Any], split: ImageSplits) -> Section:
    known = f"{', '.join(split.base_names)}"
    rows = (
        ("float model in PyTorch", f"{metrics['base_accuracy_torch']:.2%}", "", "host"),
        ("float32 TFLite", f"{metrics['base_accuracy_float']:.2%}", "", "device process"),
        (
            "int8 TFLite",
            f"{metrics['base_accuracy_int8']:.2%}",
            f"{metrics['all_accuracy_before']:.2%}",
            "device process",
        ),
        (
            "int8 TFLite after the lesson",
            f"{metrics['base_accuracy_after']:.2%}",
            f"{metrics['all_accuracy_after']:.2%}",
            "device process",
        ),
    )
    text = f"Known classes are {known}. The two taught in the field reach {metrics['new_accuracy_after']:.2%}."
    return Section(
        title="Accuracy, stage by stage",
        text=text,
        columns=("stage", "known classes", "all ten", "measured in"),
        rows=rows,
    )


def _artifacts(manifest: Manifest, metrics: dict[str, Any]) -> Section:
    rows = [
        (
            artifact.path,
            f"{manifest.files[artifact.path].bytes / 1e3:.0f} kB",
            f"{metrics['latency_ms'][artifact.precision]['p50']:.2f} / {metrics['latency_ms'][artifact.precision]['p99']:.2f} ms",
            f"{artifact.argmax_agreement:.2%}",
            f"{artifact.min_cosine:.6f}",
            f"{artifact.max_abs_difference:.1e}",
        )
        for artifact in manifest.artifacts
    ]
    if coreml := manifest.coreml:
        size = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(f"{coreml.path}/"))
        figures = (f"{coreml.argmax_agreement:.2%}", f"{coreml.min_cosine:.6f}", f"{coreml.max_abs_difference:.1e}")
        rows.append((f"{coreml.path} (float16)", f"{size / 1e3:.0f} kB", "not run: needs Apple hardware", *figures))
    return Section(
        title="Artifacts against the float model",
        text="On the real test images of the known classes. Cosine and difference: features for TFLite, logits for Core ML, "
        "whose saved program is evaluated operation by operation here.",
        columns=("artifact", "size", "p50 / p99", "same answer", "lowest cosine", "largest difference"),
        rows=tuple(rows),
    )


def _samples(split: ImageSplits, before: Answers, after: Answers) -> str:
    """The first images of each class in turn, so that every digit is seen three times."""
    labels = split.test.labels
    ranks = np.array([np.count_nonzero(labels[:index] == label) for index, label in enumerate(labels)])
    chosen = np.lexsort((labels, ranks))[:SAMPLES]
    names = truth(split)
    return charts.sample_grid(
        split.test.images[chosen],
        [names[index] for index in chosen],
        [before.labels[index] for index in chosen],
        [after.labels[index] for index in chosen],
    )


def _bad_updates(record: FieldRecord) -> Section:
    rows = tuple(
        (
            update.name,
            "refused, old model serves on" if update.refused else "NOT AS IT SHOULD BE",
            update.reason,
            update.words,
        )
        for update in record.bad_updates
    )
    text = "Three updates that must not get in were pushed over MQTT while the board was serving."
    return Section(
        title="Bad updates", text=text, columns=("update", "outcome", "reason", "the board's own words"), rows=rows
    )


def _timeline(record: FieldRecord) -> Section:
    start = record.events[0]["time"] if record.events else 0.0
    events = [(event["time"] - start, event["kind"], _short(event["data"])) for event in record.events]
    text = "As the monitor recorded them; each carries the board's boot id and sequence number."
    return Section(
        title="Events of the board", text=text, picture=charts.event_timeline(events), alt="Timeline of events"
    )


def _short(data: dict[str, Any]) -> str:
    if "label" in data:
        return f"class {data['label']} from {data.get('examples')} frames"
    return str(data.get("reason") or f"{data.get('name')} {data.get('version')} {data.get('precision')}")[:90]


def _footer(manifest: Manifest, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "bundle": f"{manifest.name} {manifest.version}, SHA-256 {metrics['bundle_sha256']}",
        "recipe": manifest.provenance["recipe_sha256"],
        "commit": manifest.provenance["commit"],
        "data": manifest.provenance["data"],
        "packages": ", ".join(f"{name} {version}" for name, version in manifest.provenance["packages"].items()),
        "machine": ", ".join(f"{key} {value}" for key, value in metrics["machine"].items()),
        "seconds": f"{metrics['seconds']:.0f} in all",
    }
