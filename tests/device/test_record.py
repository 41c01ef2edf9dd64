"""Records are what `dataclasses.dataclass(frozen=True, slots=True, kw_only=True)` makes, seen from outside."""

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.contract.record import record


@record(frozen=True, slots=True, kw_only=True)
class Made:
    """By us."""

    number: int
    words: tuple[str, ...] = ()
    table: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("number must not be negative")

    @property
    def twice(self) -> int:
        return 2 * self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Same:
    """By the standard library."""

    number: int
    words: tuple[str, ...] = ()
    table: dict[str, int] = field(default_factory=dict)


VALUES = st.fixed_dictionaries(
    {"number": st.integers(min_value=0)},
    optional={"words": st.lists(st.text()).map(tuple), "table": st.dictionaries(st.text(), st.integers())},
)


@given(VALUES, VALUES)
def test_records_are_compared_printed_and_taken_apart_as_dataclasses_are(first, second):
    ours, theirs = Made(**first), Same(**first)
    assert repr(ours) == repr(theirs).replace("Same", "Made", 1)
    assert asdict(ours) == asdict(theirs)
    assert (ours == Made(**second)) == (theirs == Same(**second))
    assert ours != theirs
    assert replace(ours, **second) == Made(**(first | second))
    assert copy.deepcopy(ours) == copy.copy(ours) == pickle.loads(pickle.dumps(ours)) == ours  # our own


def test_equal_records_are_one_key():
    assert {Made(number=1, table=()): "found"}[Made(number=1, table=())] == "found"
    with pytest.raises(TypeError):
        hash(Made(number=1))  # a dict in it


def test_records_cannot_be_changed():
    made = Made(number=1)
    for change in (
        lambda: setattr(made, "number", 2),
        lambda: setattr(made, "other", 2),
        lambda: delattr(made, "number"),
    ):
        with pytest.raises(FrozenInstanceError):
            change()
    assert made == Made(number=1)
    assert not hasattr(made, "__dict__")


@pytest.mark.parametrize(
    ("values", "named"), [({}, "'number'"), ({"number": 1, "colour": 2}, "'colour'"), ({"number": -1}, "negative")]
)
def test_wrong_arguments_are_named(values, named):
    with pytest.raises((TypeError, ValueError), match=named):
        Made(**values)


def test_defaults_are_not_shared():
    Made(number=1).table["a"] = 1
    assert Made(number=1).table == {}


def test_it_is_a_dataclass():
    assert is_dataclass(Made)
    assert [f.name for f in fields(Made)] == [f.name for f in fields(Same)]
    assert Made(number=2).twice == 4
    assert Made.__doc__ == "By us."


def test_what_is_no_record_is_refused():
    with pytest.raises(TypeError, match="use dataclasses"):
        record(frozen=False, slots=True, kw_only=True)
