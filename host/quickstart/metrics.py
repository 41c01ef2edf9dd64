"""The figures of a quickstart, from what device processes answered; shares in 0..1."""

from typing import Any

import numpy as np

from host.data.splits import ImageSplits
from host.quickstart.field import Answers, FieldRecord


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
