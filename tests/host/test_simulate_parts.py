"""The parts of a simulated board beside the agent's own: spool, commands, answers; and what follows from a seed."""

import asyncio
import itertools
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import device.commands
import device.spool
from device.app import Agent
from device.config import load_config
from device.contract.board import load_board
from device.contract.commands import ARGUMENTS
from device.contract.errors import LearningError
from device.contract.messages import VERBS, Command, Reply, Telemetry, decode_reply, decode_telemetry, encode_command
from device.contract.messages import encode_telemetry as encode
from device.contract.topics import DeviceId
from host.errors import RecipeError
from host.simulate.about import diagnose, status_table
from host.simulate.commands import INTERRUPTED, Commands
from host.simulate.config import SimulationConfig, Timing
from host.simulate.faults import EFFECTS, Fault, FaultPlan, parse_fault
from host.simulate.frames import FrameCount
from host.simulate.head import Fate, Head, Lesson
from host.simulate.models import Models, Sources
from host.simulate.ranges import Ranges
from host.simulate.release import Release, first_release
from host.simulate.spool import Spool
from host.simulate.window import Condition, Windows

BOARD = load_board("generic-x86-64")
NOW = 1_800_000_000.0


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.integers(1, 30)))
def test_ranges_are_a_set(numbers: list[int]):
    ranges, known = Ranges(), set()
    for number in numbers:
        assert ranges.add(number) == (number not in known)
        known.add(number)
    assert list(ranges) == sorted(known)
    assert len(ranges) == len(known)
    assert all((number in ranges) == (number in known) for number in range(32))
    spans = ranges.to_list()
    assert all(before[1] + 1 < after[0] for before, after in itertools.pairwise(spans))


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 200), st.sampled_from((0, 1, 2))),
    st.tuples(st.just("acknowledge"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("resend"), st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 40), st.just(0)),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(OPERATIONS, max_size=25))
def test_the_spool_holds_and_drops_what_the_agents_does(operations: list[tuple[str, int, int]]):
    clock = Clock()
    ours = Spool(max_bytes=600, max_age_s=100, clock=clock)
    with tempfile.TemporaryDirectory() as directory:
        theirs = device.spool.Spool(Path(directory, "spool.db"), max_bytes=600, max_age_s=100, clock=clock)
        for name, value, priority in operations:
            waiting = _all(ours)
            if name == "put":
                ours.put("event", b"x" * value, priority=priority)
                theirs.put("event", b"x" * value, priority=priority)
            elif name == "resend":
                ours.resend()
                theirs.resend()
            elif name == "wait":
                clock.now += value
            elif value < len(waiting):
                message = waiting[value]
                getattr(ours, name)(message)
                getattr(theirs, name)(message.id)
            for are_replies in (True, False):
                mine = [(m.id, m.payload) for m in ours.pending(0, 100, are_replies=are_replies)]
                assert mine == [(m.id, m.payload) for m in theirs.pending(0, 100, are_replies=are_replies)]
            assert (ours.depth, ours.bytes, ours.dropped) == (theirs.depth, theirs.payload_bytes, theirs.dropped)
        theirs.close()


def _all(spool: Spool) -> list[Any]:
    found = [*spool.pending(0, 100, are_replies=True), *spool.pending(0, 100, are_replies=False)]
    return sorted(found, key=lambda message: message.id)


IDS = st.text(min_size=0, max_size=3) | st.sampled_from(["a", "b"])
VALUES = st.none() | st.booleans() | st.integers(-2, 10**6) | st.floats() | st.text(max_size=4)
COMMANDS = st.builds(
    Command,
    id=IDS,
    verb=st.sampled_from((*VERBS, "format")),
    expires=st.sampled_from((NOW - 60, NOW, NOW + 60)),
    arguments=st.dictionaries(
        st.sampled_from(("label", "frame_ids", "lesson", "max_fps", "results", "source", "force")),
        VALUES | st.lists(VALUES, max_size=2),
        max_size=2,
    ),
)
PAYLOADS = st.binary(max_size=20) | COMMANDS.map(lambda command: _encode(command))


def _encode(command: Command) -> bytes:
    try:
        return encode_command(command)
    except ValueError:  # infinity is not JSON
        return b'{"id": "inf", "verb": "status", "expires": 1e999, "schema": 1}'


@settings(max_examples=15, deadline=None)
@given(st.lists(PAYLOADS, max_size=6))
def test_a_command_is_refused_or_taken_as_by_the_agent(payloads: list[bytes]):
    with tempfile.TemporaryDirectory() as directory:
        spool = device.spool.Spool(Path(directory, "spool.db"), max_bytes=10**6, max_age_s=10**6)
        theirs = device.commands.Commands(spool, dict.fromkeys(ARGUMENTS, lambda *_: {}), clock=lambda: NOW)
        ours, taken = asyncio.run(_answers(payloads))
        for payload in payloads:
            theirs.receive(payload)
        refused = {r.id: r for r in (decode_reply(m.payload) for m in spool.pending(0, 100, are_replies=True))}
        assert {reply.id: reply for reply in ours if not reply.ok} == refused
        assert {reply.id for reply in ours if reply.ok} == set(spool.unanswered_commands())
        assert len(ours) == len({reply.id for reply in ours}) == taken
        spool.close()


async def _answers(payloads: list[bytes]) -> tuple[list[Reply], int]:
    """What a simulated board answers, in order, and how many commands were new to it."""
    answered: list[Reply] = []
    tasks: list[asyncio.Task[None]] = []

    async def obey(*_: object) -> dict[str, Any]:
        return {}

    commands = Commands(
        quick=dict.fromkeys(ARGUMENTS.keys() - {"update", "rollback"}, lambda *_: {}),
        long=dict.fromkeys(("update", "rollback"), obey),
        answer=answered.append,
        clock=lambda: NOW,
        start=lambda work: tasks.append(asyncio.get_running_loop().create_task(work)),
    )
    taken = sum(commands.receive(payload) for payload in payloads)
    await asyncio.gather(*tasks)
    return answered, taken


def test_what_a_reboot_interrupts_is_answered_once():
    async def interrupt() -> list[Reply]:
        answered: list[Reply] = []
        tasks: list[asyncio.Task[None]] = []
        commands = Commands(
            quick={},
            long={"update": lambda *_: asyncio.sleep(60, {})},
            answer=answered.append,
            clock=lambda: NOW,
            start=lambda work: tasks.append(asyncio.get_running_loop().create_task(work)),
        )
        payload = encode_command(Command(id="u", verb="update", expires=NOW + 60))
        assert commands.receive(payload)
        await asyncio.sleep(0)
        tasks[0].cancel()
        commands.interrupt()
        assert not commands.receive(payload)
        return answered

    assert [(reply.id, reply.ok, reply.error) for reply in asyncio.run(interrupt())] == [("u", False, INTERRUPTED)]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """An agent in this process, without a model, which does not run."""
    monkeypatch.setattr("device.app.forbidden_modules", list)
    (tmp_path / "frames").mkdir()
    (tmp_path / "agent.toml").write_text('site = "lab"\ndevice = "cam-1"\nboard = "generic-x86-64"\n')
    config = load_config(tmp_path)
    built = Agent(tmp_path, config, load_board(config.board), stop=threading.Event())
    yield built
    built._spool.close()


def test_answers_have_the_keys_of_an_agents(agent: Agent):
    models = Models(
        first_release(BOARD.name, "int8"),
        BOARD,
        sources=Sources(None, "stable"),
        timing=Timing(),
        bad_releases={},
        event=lambda kind, **data: None,
        announce=lambda: None,
        start=lambda work: None,
        clock=lambda: NOW,
        frames_per_s=lambda: 1.0,
        has_frame=lambda frame_id: False,
    )
    spool = Spool(max_bytes=1, max_age_s=1, clock=Clock())
    status = status_table(models, device=DeviceId("a", "b"), boot="x", time=1.0, spool=spool, delegate="")
    assert {*status, "frames", "connected", "window", "sampling"} == agent.status().keys()
    about = diagnose(spool, {}, time=1.0, uptime_s=1.0)
    assert {*about, "boot", "board", "protocol"} == agent._diagnose().keys()


def test_lessons_are_learned_taken_back_and_counted_on():
    head = Head(release=first_release("generic-x86-64", "int8"), backbone="0" * 64)
    taught = head.learn(Lesson(id="1", label="cat", examples=3)).learn(Lesson(id="2", label="0", examples=1))
    assert (taught.labels[-1], taught.taught, taught.version) == ("cat", ("0", "cat"), 2)
    undone, lesson = taught.undo("1")
    assert (lesson.label, undone.labels, undone.version) == ("cat", head.labels, 3)
    with pytest.raises(LearningError, match="'9' cannot be taken back; those that can are: '1', '2'"):
        taught.undo("9")
    for label in ("", " x", "y\n"):
        with pytest.raises(LearningError, match="printable characters"):
            head.learn(Lesson(id="3", label=label, examples=1))
    for features, reason in (((1.0, 2.0), (1.0,)), "different lengths"), (((1.0,),), r"rows of 64, got shape \[1, 1\]"):
        with pytest.raises(LearningError, match=reason):
            head.require_fit(features)
    for number in range(30):
        taught = taught.learn(Lesson(id=f"n{number}", label=f"class {number % 9}", examples=1))
    assert len(taught.lessons) == 20
    with pytest.raises(LearningError, match="would be class 21, this model may learn 20"):
        taught.learn(Lesson(id="x", label="one too many", examples=1))


def release(backbone: str, labels: tuple[str, ...], *, way_from: str = "") -> Release:
    ways = frozenset({(way_from, backbone)} if way_from else ())
    return Release(
        name="m",
        version="2.0.0",
        release=2,
        sha256="1" * 64,
        bytes=1,
        labels=labels,
        boards=("generic-x86-64",),
        max_classes=9,
        feature_dim=4,
        head=backbone,
        artifacts=(("int8", backbone),),
        ways=ways,
    )


@pytest.mark.parametrize(
    ("offered", "fate"),
    [
        (release("b1", ("a",)), Fate(kept=("cat", "dog"))),
        (release("b2", ("a",), way_from="b1"), Fate(migrated=("cat", "dog"))),
        (release("b2", ("a", "cat")), Fate(shipped=("cat",), dropped=("dog",))),
    ],
)
def test_what_becomes_of_taught_classes_follows_from_the_manifest(offered: Release, fate: Fate):
    head = Head(release=release("b1", ("a",)), backbone="b1")
    for name in ("cat", "dog"):
        head = head.learn(Lesson(id=name, label=name, examples=1))
    assert head.forecast(offered, "int8") == fate
    moved = head.moved(offered, "int8")
    assert {*moved.labels} == {*offered.labels, *fate.kept, *fate.migrated}
    assert (moved.backbone, moved.release) == (offered.backbone("int8"), offered)


def test_a_lesson_names_frames_of_this_boot_and_of_late():
    clock = Clock()
    frames = FrameCount(10.0, prefix="frame-x", kept=50, clock=clock)
    clock.now += 10
    assert frames.total == 100
    frames.change_rate(1.0)
    clock.now += 10
    assert frames.newest_id() == "frame-x-110"
    held = [
        frames.has(frame) for frame in ("frame-x-110", "frame-x-61", "frame-x-60", "frame-x-111", "frame-y-110", "x")
    ]
    assert held == [True, True, False, False, False, False]


ALL_FAULTS = tuple(
    map(
        parse_fault,
        (
            "loss=0.3",
            "drift=0.5@4",
            "clock-skew=0.5",
            "reboot-storm=0.5@2",
            "spool-overflow=0.2@1",
            "bad-model=0.5:3:latency",
        ),
    )
)


def described(plan: FaultPlan) -> tuple[Any, ...]:
    cuts = tuple(plan.cuts_next() for _ in range(50))
    fates = (plan.drifts_at_s, plan.clock_offset_s, plan.reboots_at_s, plan.loses_link_at_s, plan.bad_releases)
    return (*fates, cuts)


def test_what_befalls_a_board_follows_from_seed_and_number():
    plans = [described(FaultPlan(ALL_FAULTS, seed=7, number=number)) for number in range(200)]
    assert plans == [described(FaultPlan(ALL_FAULTS, seed=7, number=number)) for number in range(200)]
    assert plans != [described(FaultPlan(ALL_FAULTS, seed=8, number=number)) for number in range(200)]
    assert 60 < sum(plan[0] is not None for plan in plans) < 140
    assert 60 < sum(plan[1] != 0 for plan in plans) < 140
    assert all(2 <= moment <= 5 for plan in plans for moment in plan[2])
    assert all(not any(plan[5]) for plan in plans if plan[3] is not None)
    assert 0.2 < sum(sum(plan[5]) for plan in plans if plan[3] is None) / (50 * sum(p[3] is None for p in plans)) < 0.4
    assert {3: "latency"} in [plan[4] for plan in plans]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("loss", "write NAME=RATE"),
        ("loss=1.2.3", "write NAME=RATE"),
        ("loss=2", "rate must be 0..1, got 2"),
        ("rain=1", "'rain' is unknown; faults are loss, drift"),
        ("loss=1@5", "loss: takes no start; only drift, reboot-storm, spool-overflow do"),
        ("bad-model=1", "only bad-model has a release"),
        ("loss=1:2:latency", "only bad-model has a release"),
        ("bad-model=1:2:smoke", "'smoke' is unknown; effects are selftest, probation"),
    ],
)
def test_a_wrong_fault_is_one_clear_error(text: str, reason: str):
    with pytest.raises(RecipeError, match=reason):
        parse_fault(text)


@given(st.sampled_from(("drift", "reboot-storm", "spool-overflow")), st.floats(0, 1), st.floats(0, 1e4))
def test_a_fault_reads_as_it_was_written(kind: str, rate: float, start_s: float):
    text = f"{kind}={rate:.6f}@{start_s:.3f}"
    assert parse_fault(text) == Fault(kind=kind, rate=round(rate, 6), start_s=round(start_s, 3))


def measure(effect: str = "", *, shift: float = 0.0, seed: int = 1) -> dict[str, float]:
    windows = Windows(random.Random(seed), latency_s=0.04, memory_bytes=10**8)
    return windows.measure(10, Condition(frames_per_s=20, elapsed_s=10, shift=shift, effect=effect))


def test_windows_follow_from_a_seed_and_are_what_the_contract_takes():
    values = measure()
    assert values == measure()
    assert values != measure(seed=2)
    assert sum(count for name, count in values.items() if name.startswith("class/")) == values["frames"] == 200
    device_id = DeviceId("a", "b")
    telemetry = Telemetry(boot="x", sequence=1, time=NOW, values=values)
    assert decode_telemetry(encode(device_id, telemetry), sender=device_id) == telemetry


def test_a_bad_model_and_other_frames_show_in_the_window():
    good = measure()
    assert measure("latency")["latency/p50"] > 4 * good["latency/p50"]
    assert measure("errors")["errors"] > 30
    assert good["drift"] < 0.5 < 1.0 < measure("drift")["drift"]
    assert measure(shift=1.0)["confidence"] < good["confidence"] - 0.2
    assert measure("selftest") == measure("probation") == good
    assert set(EFFECTS) == {"selftest", "probation", "latency", "errors", "drift"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"devices": 0}, "--devices must be 1..100000, got 0"),
        ({"devices": 2, "processes": 3}, "--processes must be 1..2"),
        ({"devices": 1, "interval_s": 0.0}, "--rate must be 0.1..86400 seconds, got 0"),
        ({"devices": 1, "duration_s": -1.0}, "--duration must be above 0"),
        ({"devices": 1, "site": "a/b"}, "--site 'a/b': use 1 to 64 letters"),
        ({"devices": 1, "channel": ""}, "--channel '': use 1 to 64 letters"),
    ],
)
def test_a_wrong_fleet_is_one_clear_error(values: dict[str, Any], reason: str):
    with pytest.raises(RecipeError, match=reason):
        SimulationConfig(**values)
