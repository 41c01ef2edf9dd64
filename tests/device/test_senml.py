"""SenML: RFC 8428's own examples (section 5.1), and laws over generated packs."""

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.contract.errors import MessageError
from device.contract.senml import RELATIVE_BELOW, Record, resolve

MAC = "urn:dev:ow:10e2073a01080063"
NOW = 1.8e9


def test_5_1_1_single_data_point():
    assert resolve([{"n": MAC, "u": "Cel", "v": 23.1}], now=NOW) == [Record(name=MAC, unit="Cel", value=23.1, time=NOW)]


def test_5_1_2_multiple_data_points():
    pack = [{"bn": f"{MAC}:", "n": "voltage", "u": "V", "v": 120.1}, {"n": "current", "u": "A", "v": 1.2}]
    assert [(record.name, record.unit, record.value) for record in resolve(pack)] == [
        (f"{MAC}:voltage", "V", 120.1),
        (f"{MAC}:current", "A", 1.2),
    ]


def test_5_1_2_with_base_time_unit_and_version():
    base = {"bn": "urn:dev:ow:10e2073a0108006:", "bt": 1.276020076001e09, "bu": "A", "bver": 5}
    pack = [base | {"n": "voltage", "u": "V", "v": 120.1}]
    pack += [{"n": "current", "t": t, "v": v} for t, v in ((-5, 1.2), (-4, 1.3), (-3, 1.4), (-2, 1.5), (-1, 1.6))]
    pack += [{"n": "current", "v": 1.7}]
    resolved = resolve(pack, now=NOW)
    assert [record.time for record in resolved] == [1.276020076001e09 + t for t in (0, -5, -4, -3, -2, -1, 0)]
    assert [record.unit for record in resolved] == ["V"] + 6 * ["A"]


def test_5_1_2_relative_times():
    pack = [
        {"bn": "urn:dev:ow:10e2073a0108006:", "bu": "A", "n": "current", "t": -5, "v": 1.2},
        {"n": "current", "v": 1.7},
    ]
    assert [record.time for record in resolve(pack, now=NOW)] == [NOW - 5, NOW]
    assert [record.time for record in resolve(pack)] == [-5, 0]


MEASUREMENTS = [
    {"bn": MAC, "bt": 1.320067464e09, "bu": "%RH", "v": 20},
    {"u": "lon", "v": 24.30621},
    {"u": "lat", "v": 60.07965},
    {"t": 60, "v": 20.3},
    {"u": "lon", "t": 60, "v": 24.30622},
    {"u": "%EL", "t": 150, "v": 98},
    {"t": 180, "v": 21.2},
]


def test_5_1_3_and_5_1_4_a_pack_and_its_resolved_form():
    resolved = resolve(MEASUREMENTS)
    assert resolved[0] == Record(name=MAC, unit="%RH", time=1.320067464e09, value=20)
    assert resolved[3] == Record(name=MAC, unit="%RH", time=1.320067524e09, value=20.3)
    assert resolved[5] == Record(name=MAC, unit="%EL", time=1.320067614e09, value=98)


def test_5_1_5_multiple_data_types():
    pack = [
        {"bn": f"{MAC}:", "n": "temp", "u": "Cel", "v": 23.1},
        {"n": "label", "vs": "Machine Room"},
        {"n": "open", "vb": False},
        {"n": "nfc-reader", "vd": "aGkgCg"},
    ]
    assert [record.value for record in resolve(pack)] == [23.1, "Machine Room", False, "aGkgCg"]


def test_5_1_6_collection_of_resources():
    pack = [
        {"bn": "2001:db8::2/", "bt": 1.320078429e09, "n": "temperature", "u": "Cel", "v": 25.2},
        {"n": "humidity", "u": "%RH", "v": 30},
        {"bn": "2001:db8::1/", "n": "temperature", "u": "Cel", "v": 12.3},
        {"n": "humidity", "u": "%RH", "v": 67},
    ]
    assert [record.name for record in resolve(pack)] == [
        f"2001:db8::{host}/{name}" for host in (2, 1) for name in ("temperature", "humidity")
    ]
    assert {record.time for record in resolve(pack)} == {1.320078429e09}


def test_base_value_and_base_sum():
    pack = [{"bn": "a", "bv": 100, "bs": 10, "v": 1, "s": 2}, {"v": 2}, {"s": 5}, {"vs": "text"}]
    assert [(record.value, record.sum) for record in resolve(pack)] == [(101, 12), (102, 10), (None, 15), ("text", 10)]


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        ([], "at least one record"),
        ({}, "expected a pack"),
        ([1], "record 0: expected a table"),
        ([{"n": "a"}], "has no value"),
        ([{"bn": "a"}, {"u": "V"}], "record 1: has no value"),
        ([{"n": "a", "v": 1, "vs": "x"}], "more than one value"),
        ([{"v": 1}], "name '' must be"),
        ([{"n": "-a", "v": 1}], "name '-a' must be"),
        ([{"n": "a b", "v": 1}], "name 'a b' must be"),
        ([{"n": "a", "v": "1"}], "v must be a number"),
        ([{"n": "a", "v": True}], "v must be a number"),
        ([{"n": "a", "vb": 1}], "vb must be true or false"),
        ([{"n": 1, "v": 1}], "n must be text"),
        ([{"n": "a", "v": 10**400}], "finite"),
        ([{"bn": "a", "bv": 1.7e308, "v": 1.7e308}], "add up to no finite number"),
        ([{"n": "a", "v": 1, "bver": 11}], "bver 11"),
        ([{"n": "a", "v": 1, "new_": 1}], "'new_' must be understood"),
    ],
)
def test_what_is_no_senml_is_refused_by_name(pack, message):
    with pytest.raises(MessageError, match=message):
        resolve(pack)


numbers = st.floats(-1e6, 1e6)
records = st.builds(
    Record,
    name=st.from_regex(r"[a-z0-9][a-z0-9:./_-]{0,8}", fullmatch=True),
    time=st.floats(RELATIVE_BELOW, 4e9),
    unit=st.none() | st.sampled_from(["V", "Cel"]),
    value=numbers | st.text(max_size=5) | st.booleans(),
)


def write(record: Record) -> dict[str, object]:
    key = {bool: "vb", str: "vs"}.get(type(record.value), "v")
    unit = {"u": record.unit} if record.unit else {}
    return {"n": record.name, "t": record.time, key: record.value} | unit


@given(st.lists(records, min_size=1, max_size=8))
def test_resolved_records_resolve_to_themselves(expected):
    assert resolve([write(record) for record in expected]) == expected
    assert resolve([write(record) for record in expected], now=NOW) == expected


@given(st.lists(records, min_size=1, max_size=8), st.integers(0, 8))
def test_a_common_beginning_of_the_names_may_stand_in_a_base(expected, cut):
    pack = [write(record) for record in expected]
    for fields, record in zip(pack, expected, strict=True):
        fields |= {"bn": record.name[:cut], "n": record.name[cut:]}
    assert resolve(pack) == expected


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from([*"nuvst", "vs", "vb", "vd", "bn", "bt", "bu", "bv", "bs", "bver", "ut", "x_"]),
                inner,
                max_size=6,
            )
        ),
        max_leaves=20,
    )
)
def test_hostile_packs_are_resolved_or_refused_by_name(value):
    with contextlib.suppress(MessageError):
        for record in resolve(json.loads(json.dumps(value))):
            assert math.isfinite(record.time)
