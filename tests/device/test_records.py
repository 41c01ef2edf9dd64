"""Tables become records strictly, and every refusal names the key."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.contract.errors import ConfigError, MessageError
from device.contract.records import from_table, to_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    parts: tuple[Inner, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    maybe: Inner | None = None
    flag: bool = False
    anything: Any = None


GOOD = {"name": "x", "inner": {"size": 1}}

inners = st.builds(Inner, size=st.integers(), ratio=st.floats(allow_nan=False, allow_infinity=False))
outers = st.builds(
    Outer,
    name=st.text(),
    inner=inners,
    parts=st.lists(inners, max_size=3).map(tuple),
    notes=st.dictionaries(st.text(), st.text(), max_size=3),
    maybe=st.none() | inners,
    flag=st.booleans(),
    anything=st.integers() | st.text(),
)


@given(outers)
def test_records_come_back(record):
    assert from_table(Outer, to_table(record), where="t") == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, r"t: unknown key 'nmae'; known keys are anything, flag, inner"),
        ({"inner": {"size": "1"}}, r"t\.inner\.size: expected int, got '1'"),
        ({"inner": {"size": True}}, r"t\.inner\.size: expected int, got True"),
        ({"inner": {}}, r"t\.inner: missing key 'size'"),
        ({"inner": 3}, r"t\.inner: expected a table, got int"),
        ({"parts": [{"size": 1}, {"size": 1.5}]}, r"t\.parts\[1\]\.size: expected int, got 1\.5"),
        ({"parts": "ab"}, r"t\.parts: expected a list"),
        ({"notes": {"a": 1}}, r"t\.notes\.a: expected str, got 1"),
        ({"inner": {"size": 1, "ratio": float("nan")}}, r"t\.inner\.ratio: must be a finite number, got nan"),
        ({"flag": 1}, r"t\.flag: expected bool, got 1"),
        ({"name": None}, r"t\.name: expected str, got None"),
    ],
)
def test_refusals_name_the_key_and_the_value(change, message):
    with pytest.raises(ConfigError, match=message):
        from_table(Outer, {**GOOD, **change}, where="t")


def test_whole_numbers_are_floats_and_the_error_class_is_the_callers():
    assert from_table(Inner, {"size": 1, "ratio": 2}, where="t").ratio == 2.0
    with pytest.raises(MessageError):
        from_table(Inner, [], where="t", error=MessageError)
