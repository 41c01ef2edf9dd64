"""What the `data` table of a recipe may say."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.contract.records import from_table, to_table
from host.data.spec import TORCHVISION_SETS, DataSpec, held_back_labels, listed
from host.data.torchvision_sets import SETS
from host.errors import RecipeError

SOURCES = ["digits", "mnist", "folder:photos/", "npz:a.npz", "shards:a-{00..15}.tar", "torchvision:CIFAR100"]


@pytest.mark.parametrize("source", SOURCES)
def test_spec_survives_its_table(source):
    spec = DataSpec(source=source, held_back=("5..9",), imbalance=100.0, validation_share=0.2, unreadable="skip")
    assert from_table(DataSpec, to_table(spec), where="data") == spec
    assert spec.source == source == (f"{spec.kind}:{spec.location}" if spec.location else spec.kind)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"source": "foldr:photos"}, "data.source 'foldr:photos' is unknown; did you mean 'folder'"),
        ({"source": "cifar10"}, "did you mean 'cifar10-jpeg75'"),
        ({"source": "Digits"}, "did you mean 'digits'"),
        ({"source": "qqq"}, r"is unknown\. Known are digits, .*shards:PATTERN"),
        ({"source": "folder"}, "is unknown.*folder:PATH"),
        ({"source": "npz:"}, "names nothing after the colon; write npz:PATH"),
        ({"source": "torchvision:cifar10"}, "did you mean 'CIFAR10'"),
        ({"source": "torchvision:ImageNet"}, "It reads CIFAR10, .*folder:PATH"),
        ({"source": "shards:https://example.org/a.tar"}, "is remote; copy it to this machine"),
        ({"source": "shards:pipe:cat a.tar"}, "is remote"),
        ({"source": "folder:s3://bucket/photos"}, "is remote"),
        ({"source": "digits", "test_share": 0.0}, "data.test_share must be above 0 and below 1, got 0.0"),
        ({"source": "digits", "validation_share": 1.0}, "data.validation_share must be .* got 1.0"),
        ({"source": "digits", "validation_share": float("nan")}, "got nan"),
        ({"source": "digits", "imbalance": 0.5}, "data.imbalance must be 1 or more, got 0.5"),
        ({"source": "digits", "imbalance": float("inf")}, "got inf"),
        ({"source": "digits", "unreadable": "ignore"}, "must be 'refuse' or 'skip', got 'ignore'"),
        ({"source": "digits", "held_back": ("8", "8")}, "names a class twice: 8, 8"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(table, message):
    with pytest.raises(RecipeError, match=message):
        DataSpec(**table)


def test_held_back_are_names_and_ranges_of_numbers():
    names = [f"class {n}" for n in range(100)]
    assert held_back_labels(("class 3", "50..52"), names) == [3, 50, 51, 52]
    assert held_back_labels(("0..1",), ["0..1", "a", "b"]) == [0]  # a class may be called like a range


@pytest.mark.parametrize(
    ("held_back", "message"),
    [
        (("cot",), r"no class 'cot'; did you mean 'cat'\? The classes are cat, dog, eel, fox"),
        (("zzz",), r"no class 'zzz'\. The classes are"),
        (("3..4",), r"'3..4' is no range within the class numbers 0..3"),
        (("2..1",), "is no range"),
        (("cat", "0..1"), "means class 'cat' twice"),
        (("0..2",), "leaves 1 of 4 classes for training; leave at least 2"),
    ],
)
def test_held_back_that_does_not_fit_is_refused(held_back, message):
    with pytest.raises(RecipeError, match=message):
        held_back_labels(held_back, ["cat", "dog", "eel", "fox"])


@given(st.lists(st.text(min_size=1), max_size=30), st.integers(1, 5))
def test_a_list_shows_the_first_and_counts_the_rest(names, most):
    assert listed(names, most).endswith(f"and {len(names) - most} more" if len(names) > most else ", ".join(names))


def test_the_names_of_torchvision_sets_are_those_that_are_read():
    assert set(TORCHVISION_SETS) == set(SETS)


def test_reading_a_spec_loads_no_array_library():
    script = "import sys, host.data.spec; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert {"numpy", "PIL", "torch"}.isdisjoint(loaded)
