"""What a device writes the host reads, and nothing else is read: for every message, over generated values."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.contract.errors import MessageError
from device.contract.messages import (
    EVENT_KINDS,
    MAX_PAYLOAD_BYTES,
    UNITS,
    Command,
    Event,
    ModelState,
    Reply,
    Result,
    State,
    Telemetry,
    decode_command,
    decode_event,
    decode_reply,
    decode_result,
    decode_state,
    decode_telemetry,
    encode_command,
    encode_event,
    encode_reply,
    encode_result,
    encode_state,
    encode_telemetry,
)
from device.contract.topics import KINDS, DeviceId, parse_topic

DEVICE = DeviceId("lab", "cam-1")
DECODERS = [decode_command, decode_event, decode_reply, decode_result, decode_state, decode_telemetry]

boots = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128)
times = st.floats(0, 253402300799, allow_nan=False)
text = st.text(st.characters(codec="utf-8"), max_size=30)
number = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.integers(0, 4_000_000_000_000_000).map(lambda microseconds: microseconds / 1_000_000)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | number | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
tables = st.dictionaries(text, json_values, max_size=5)
names = st.sampled_from(sorted(UNITS)) | st.integers(0, 999).map("class/{}".format)

states = st.builds(
    State,
    status=st.sampled_from(["online", "offline"]),
    boot=boots,
    time=st.none() | times,
    board=st.none() | text,
    slot=st.none() | text,
    model=st.none()
    | st.builds(ModelState, name=text, version=text, release=st.integers(), precision=text, backbone=text),
    labels=st.lists(text, max_size=4).map(tuple),
    learned_version=st.integers(),
    forbidden_modules=st.lists(text, max_size=2).map(tuple),
)
telemetries = st.builds(
    Telemetry,
    boot=boots,
    sequence=st.integers(1, 2**53),
    time=times,
    values=st.dictionaries(names, number, max_size=10),
)
events = st.builds(
    Event, kind=st.sampled_from(EVENT_KINDS), boot=boots, sequence=st.integers(1, 2**53), time=seconds, data=tables
)
commands = st.builds(Command, id=text, verb=text, expires=number, arguments=tables)
replies = st.builds(Reply, id=text, ok=st.booleans(), result=tables, error=st.none() | text)
results = st.builds(Result, frame_id=text, label=text, confidence=number, time=times)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine the first draw takes seconds
@given(states, commands, replies, results)
def test_records_come_back_as_they_were_sent(state, command, reply, result):
    assert decode_state(encode_state(state)) == state
    assert decode_command(encode_command(command)) == command
    assert decode_reply(encode_reply(reply)) == reply
    assert decode_result(encode_result(result)) == result


@given(telemetries)
def test_telemetry_comes_back_and_is_senml(telemetry):
    payload = encode_telemetry(DEVICE, telemetry)
    expected = telemetry if telemetry.time >= 2**28 else replace(telemetry, time=0.0)  # a clock that was never set
    assert decode_telemetry(payload, sender=DEVICE) == expected
    records = json.loads(payload)
    assert records[0]["bn"] == "fieldvit/lab/cam-1/"
    assert all(
        sum(key in record for key in ("v", "vs", "vb", "vd")) == 1 for record in records
    )  # RFC 8428, section 4.2


@given(events)
def test_events_come_back_and_are_cloudevents(event):
    payload = encode_event(DEVICE, event)
    decoded = decode_event(payload)
    assert (decoded.kind, decoded.boot, decoded.sequence, decoded.data) == (
        event.kind,
        event.boot,
        event.sequence,
        event.data,
    )
    assert decoded.time == pytest.approx(event.time, abs=1e-5)
    table = json.loads(payload)
    assert {"specversion", "id", "source", "type"} <= table.keys()  # required by CloudEvents 1.0
    assert all(name.isalnum() and name.islower() for name in table)  # its rule for attribute names


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_decoders_refuse_what_no_encoder_wrote(payload):
    for decode in DECODERS:
        with pytest.raises(MessageError) as refused:
            decode(payload)
        assert "\n" not in str(refused.value)


@given(states, st.data())
def test_a_changed_value_is_refused_or_is_a_state_again(state, data):
    table = json.loads(encode_state(state))
    table[data.draw(st.sampled_from(sorted(table)) | text)] = data.draw(json_values)
    try:
        decoded = decode_state(json.dumps(table).encode())
    except MessageError:
        return
    assert decode_state(encode_state(decoded)) == decoded


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_finite_numbers_are_sent_or_read(value):
    with pytest.raises((MessageError, ValueError)):
        encode_telemetry(DEVICE, Telemetry(boot="b", sequence=1, time=0.0, values={"drift": value}))
    good = encode_telemetry(DEVICE, Telemetry(boot="b", sequence=1, time=0.0, values={"drift": 0.25}))
    with pytest.raises(MessageError):
        decode_telemetry(good.replace(b"0.25", json.dumps(value).encode()))


def test_payloads_over_the_limit_are_refused_unread():
    with pytest.raises(MessageError, match="over the limit"):
        decode_command(b"[" * (MAX_PAYLOAD_BYTES + 1))


def test_deeply_nested_payloads_are_refused():
    for decode in DECODERS:
        with pytest.raises(MessageError):
            decode(b"[" * 100_000)


@pytest.mark.parametrize("decode", [decode_command, decode_reply, decode_result, decode_state])
def test_another_schema_is_refused_by_name(decode):
    with pytest.raises(MessageError, match="schema 2 is not 1"):
        decode(b'{"schema": 2}')


@given(
    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    st.sampled_from(KINDS),
)
def test_topics_come_back(site, device, kind):
    device_id = DeviceId(site, device)
    assert parse_topic(device_id.topic(kind)) == (device_id, kind)


@given(
    st.text(max_size=20).filter(
        lambda name: not name.isascii() or not name.replace("-", "a").replace("_", "a").isalnum()
    )
)
def test_ids_that_would_break_a_topic_are_refused(name):
    with pytest.raises(MessageError):
        DeviceId(name, "cam")
    with pytest.raises(MessageError):
        parse_topic(f"fieldvit/v1/{name}/cam/state")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["n", "v", "vs", "u", "bt", "boot", "seq", "schema", "status", "time", "data", "id"]),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_hostile_json_is_read_or_refused_by_name(value):
    payload = json.dumps(value).encode()
    for decode in DECODERS:
        with contextlib.suppress(MessageError):  # any other error would end a receiver's thread
            decode(payload)


@pytest.mark.parametrize("sequence", [0, -1, 2**53 + 1])
def test_sequences_out_of_range_are_refused(sequence):
    payload = encode_telemetry(DEVICE, Telemetry(boot="b", sequence=sequence, time=0.0, values={}))
    with pytest.raises(MessageError, match="sequence must be"):
        decode_telemetry(payload)


TELEMETRY = Telemetry(boot="b", sequence=7, time=1.7e9, values={"drift": 0.25, "class/0": 3.0})


def test_a_pack_that_is_divided_in_another_way_says_the_same():
    records = [
        {"bn": "fieldvit/lab/", "bt": 1.7e9 - 5, "n": "cam-1/boot", "vs": "b", "t": 5},
        {"n": "cam-1/seq", "v": 7, "t": 5, "unknown": "ignored"},
        {"bn": "fieldvit/lab/cam-1/", "bt": 1.7e9, "n": "schema", "v": 1},
        {"bu": "/", "n": "drift", "v": 0.25},
        {"bv": 1, "n": "class/0", "v": 2, "u": "count"},
    ]
    assert decode_telemetry(json.dumps(records).encode(), sender=DEVICE) == TELEMETRY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn": "fieldvit/lab/cam-2/"}, "names must begin with fieldvit/lab/cam-1/"),
        ({"bn": "elsewhere/lab/cam-1/"}, "names must begin with"),
        ({"bt": 100.0}, "neither now nor after 1978"),
        ({"bver": 11}, "bver 11"),
        ({"v": 1}, "more than one value"),
        ({"x_": 1}, "must be understood"),
        ({"bs": 1.0}, "has a sum"),
    ],
)
def test_packs_of_others_and_of_other_versions_are_refused(change, message):
    records = json.loads(encode_telemetry(DEVICE, TELEMETRY))
    records[0] |= change
    with pytest.raises(MessageError, match=message):
        decode_telemetry(json.dumps(records).encode(), sender=DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "fieldvit/lab/cam-2"}, "source 'fieldvit/lab/cam-2' is not fieldvit/lab/cam-1"),
        ({"id": "b-8"}, "is not boot id and sequence"),
        ({"id": ""}, "id must be text, and not empty"),
        ({"source": None}, "source must be text"),
        ({"specversion": "0.3"}, "CloudEvents 1.0"),
        ({"Subject": "x"}, "lower-case letters and digits"),
        ({"extension": [1]}, "must be text, a whole number"),
        ({"datacontenttype": "text/xml"}, "is not application/json"),
        ({"time": "2026-01-01"}, "is not RFC 3339"),
        ({"time": "2026-01-01T00:00:00"}, "is not RFC 3339"),
        ({"time": "2026-W01-1T00:00:00Z"}, "is not RFC 3339"),
        ({"type": "drift"}, "type 'drift' is unknown"),
    ],
)
def test_events_that_are_no_cloudevents_or_others_are_refused(change, message):
    event = json.loads(encode_event(DEVICE, Event(kind="drift", boot="b", sequence=7, time=1.7e9, data={})))
    decode_event(
        json.dumps(event | {"subject": "x", "traceparent": "y"}).encode(), sender=DEVICE
    )  # extensions may come
    with pytest.raises(MessageError, match=message):
        decode_event(json.dumps(event | change).encode(), sender=DEVICE)
