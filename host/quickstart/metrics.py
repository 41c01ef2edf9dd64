"""The figures of a quickstart, from what device processes answered; shares in 0..1."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from host.data.splits import ImageSplits
from host.quickstart.field import Answers, FieldRecord

AT_LEAST = {
    "base_accuracy_float": 0.99,
    "all_accuracy_after": 0.94,
    "tflite_argmax_agreement": 1.0,
    "coreml_argmax_agreement": 0.995,
    "bad_updates_refused": 1.0,
}
AT_MOST = {"int8_drop": 0.01, "old_classes_drop": 0.01}
OF_TRAINING = ("base_accuracy_float", "all_accuracy_after", "int8_drop", "old_classes_drop")
"""What a few epochs need not reach."""


def missed_bounds(metrics: Mapping[str, Any], *, training_too: bool) -> list[str]:
    """What a quickstart promises and did not reach, in words.

    Args:
        metrics: as `quickstart_metrics` and the host's stages give them.
        training_too: whether the accuracies count as well.
    """
    figures = {**metrics, "int8_drop": metrics["base_accuracy_float"] - metrics["base_accuracy_int8"]}
    low = [f"{name} is {figures[name]:.4f}, below {bound}" for name, bound in AT_LEAST.items() if figures[name] < bound]
    high = [f"{name} is {figures[name]:.4f}, above {bound}" for name, bound in AT_MOST.items() if figures[name] > bound]
    return [text for text in (*low, *high) if training_too or not text.startswith(OF_TRAINING)]


def quickstart_metrics(record: FieldRecord, split: ImageSplits) -> dict[str, Any]:
    """Accuracies on the test images, as the board answered them, and what became of the bad updates."""
    old_before, old_after = base_accuracy(record.int8_before, split), base_accuracy(record.int8_after, split)
    return {
        "base_accuracy_float": base_accuracy(record.float_before, split),
        "base_accuracy_int8": old_before,
        "all_accuracy_before": accuracy(record.int8_before, split),
        "all_accuracy_after": accuracy(record.int8_after, split),
        "base_accuracy_after": old_after,
        "new_accuracy_after": _share(record.int8_after, split, ~_is_base(split)),
        "old_classes_drop": old_before - old_after,
        "bad_updates_refused": float(np.mean([update.refused for update in record.bad_updates])),
        "latency_ms": {
            "int8": {"p50": record.int8_after.p50_ms, "p90": record.int8_after.p90_ms, "p99": record.int8_after.p99_ms},
            "float32": {
                "p50": record.float_before.p50_ms,
                "p90": record.float_before.p90_ms,
                "p99": record.float_before.p99_ms,
            },
        },
        "agent_modules_ok": bool(record.status["modules_ok"]),
    }


def accuracy(answers: Answers, split: ImageSplits) -> float:
    """Share of all test images answered right."""
    return _share(answers, split, np.ones(len(split.test.labels), bool))


def base_accuracy(answers: Answers, split: ImageSplits) -> float:
    """Share of the test images of the base classes answered right."""
    return _share(answers, split, _is_base(split))


def confusion(answers: Answers, split: ImageSplits) -> np.ndarray:
    """Counts int64 [K, K], rows are the truth, over all classes."""
    index = {name: position for position, name in enumerate(split.label_names)}
    counts = np.zeros((len(index), len(index)), np.int64)
    np.add.at(counts, (split.test.labels, [index[label] for label in answers.labels]), 1)
    return counts


def truth(split: ImageSplits) -> list[str]:
    """The true label of each test image."""
    return [split.label_names[label] for label in split.test.labels]


def _is_base(split: ImageSplits) -> np.ndarray:
    return np.isin(split.test.labels, split.base_labels)


def _share(answers: Answers, split: ImageSplits, chosen: np.ndarray) -> float:
    right = np.array(answers.labels) == np.array(truth(split))
    return float(right[chosen].mean())
