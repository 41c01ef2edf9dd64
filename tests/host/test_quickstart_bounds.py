"""The quickstart says so when it misses what it promises."""

import pytest

from host.quickstart.metrics import missed_bounds

GOOD = {
    "base_accuracy_float": 0.995,
    "base_accuracy_int8": 0.99,
    "all_accuracy_after": 0.96,
    "old_classes_drop": 0.002,
    "tflite_argmax_agreement": 1.0,
    "coreml_argmax_agreement": 0.999,
    "bad_updates_refused": 1.0,
}


def test_good_figures_miss_nothing():
    assert missed_bounds(GOOD, training_too=True) == []


@pytest.mark.parametrize(
    ("name", "value", "is_training"),
    [
        ("base_accuracy_float", 0.98, True),
        ("base_accuracy_int8", 0.98, True),
        ("all_accuracy_after", 0.93, True),
        ("old_classes_drop", 0.02, True),
        ("tflite_argmax_agreement", 0.999, False),
        ("coreml_argmax_agreement", 0.99, False),
        ("bad_updates_refused", 2 / 3, False),
    ],
)
def test_each_missed_figure_is_named(name, value, is_training):
    (missed,) = missed_bounds({**GOOD, name: value}, training_too=True)
    assert name in missed or name == "base_accuracy_int8"
    assert bool(missed_bounds({**GOOD, name: value}, training_too=False)) is not is_training
