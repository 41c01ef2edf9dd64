"""Rollouts against boards that behave in every way, with the real store and journals, and an engine that dies anywhere.

The boards here are as small as they can be: they obey commands once, and say what the agent says. The real agent's part
is in `test_rollout_agent.py`.
"""

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.contract.commands import is_command_id
from device.contract.messages import Command, Event, ModelState, Reply, State, Telemetry
from device.contract.topics import DeviceId
from host.errors import FleetError
from host.monitor.rollout.decide import MAX_REVERTS, command_id
from host.monitor.rollout.engine import Engine, Order, is_over
from host.monitor.rollout.journal import Entry, Journal
from host.monitor.rollout.plan import Limits, Plan, Stage, parse_stages
from host.monitor.rollouts_view import rollouts_view
from host.monitor.store import Store, open_store

OLD, NEW = 1, 2
STEP_S = 30.0
LIMITS = Limits(soak_s=60.0, patience_s=600.0, max_failed=0.1)
MODELS = {
    release: ModelState(name="m", version=f"{release}.0.0", release=release, precision="int8", backbone=f"b{release}")
    for release in (OLD, NEW, 3)
}
KINDS = ("good", "refuses", "would forget", "falls back", "slow", "errs", "drifts", "busy once")


@dataclass
class FakeBoard:
    """`kind` is how the new release does on it; `is_online` whether it hears commands."""

    device: DeviceId
    kind: str = "good"
    is_online: bool = True
    release: int = OLD
    sequence: int = 0
    confirmed_at: float | None = None
    queue: list[Command] = field(default_factory=list)
    obeyed: dict[str, Reply] = field(default_factory=dict)

    def be_born(self, store: Store, now: float) -> None:
        state = State(status="online", boot=self.device.device, time=now, model=MODELS[self.release])
        store.record_state(self.device, state, received=now)

    def live(self, store: Store, now: float) -> None:
        """What happens on the board in one step."""
        if not self.is_online:
            return
        for command in self.queue:
            if command.id not in self.obeyed:
                expired = Reply(id=command.id, ok=False, error="expired 5 s ago by this board's clock; send it again")
                self.obeyed[command.id] = expired if now > command.expires else self._obey(command, store, now)
                store.record_reply(self.device, self.obeyed[command.id], received=now)
        self.queue.clear()
        if self.confirmed_at is not None and now >= self.confirmed_at:
            self.confirmed_at = None
            self._say(store, "confirmed", now)
        self._measure(store, now)

    def _obey(self, command: Command, store: Store, now: float) -> Reply:
        if command.verb == "rollback":
            if self.release != NEW:
                return Reply(id=command.id, ok=False, error="no earlier confirmed model")
            self.release, self.confirmed_at = OLD, None
            self._say(store, "rolled-back", now, reason="rolled-back", detail="by the operator")
            self.be_born(store, now)
            return Reply(id=command.id, ok=True)
        assert command.arguments == {"channel": "canary"}
        if self.kind == "busy once" and not self.obeyed:
            self._say(store, "refused", now, release=None, reason="busy", detail="a model is in testing")
            return Reply(id=command.id, ok=False, error="busy: a model is in testing")
        if self.release == NEW:
            return Reply(id=command.id, ok=True, result={"updated": False})
        if self.kind == "refuses":
            self._say(store, "refused", now, reason="selftest", detail="golden features differ")
            return Reply(id=command.id, ok=False, error="golden features differ")
        if self.kind == "would forget":
            self._say(store, "refused", now, release=None, reason="learned-loss", detail="it would drop 'ripe'")
            return Reply(id=command.id, ok=False, error="it would drop 'ripe'")
        self._say(store, "installed", now)
        if self.kind == "falls back":
            self._say(store, "rolled-back", now, reason="budget", detail="too slow")
        else:
            self.release, self.confirmed_at = NEW, now + STEP_S
            self.be_born(store, now)
        return Reply(id=command.id, ok=True, result={"updated": True})

    def _say(self, store: Store, kind: str, now: float, **data: object) -> None:
        self.sequence += 1
        about = {name: value for name, value in {"release": NEW, **data}.items() if value is not None}
        event = Event(kind=kind, boot=self.device.device, sequence=self.sequence, time=now, data=about)
        store.record_event(self.device, event, received=now)

    def _measure(self, store: Store, now: float) -> None:
        self.sequence += 1
        is_new = self.release == NEW
        values = {
            "frames": 100.0,
            "errors": 50.0 if is_new and self.kind == "errs" else 0.0,
            "latency/p50": 0.03 if is_new and self.kind == "slow" else 0.01,
            "drift": 3.0 if is_new and self.kind == "drifts" else 0.1,
        }
        telemetry = Telemetry(boot=self.device.device, sequence=self.sequence, time=now, values=values)
        store.record_telemetry(self.device, telemetry, received=now)


class World:
    """A fleet, a store, and an engine that may be killed."""

    def __init__(self, directory: Path, kinds: Iterable[str]) -> None:
        self.now = 1_000_000.0
        self.root = directory / "rollouts"
        self.store = open_store(directory / "store.db")
        self.boards = {}
        for number, kind in enumerate(kinds):
            device = DeviceId("lab", f"cam-{number:03d}")
            self.boards[device] = FakeBoard(device, kind)
            self.boards[device].be_born(self.store, self.now)
        self.sent: list[Order] = []
        self.is_broken = False
        self.engine = self.new_engine()
        for _ in range(3):
            self.live()

    def new_engine(self) -> Engine:
        return Engine(self.root, self.store, self.send, clock=lambda: self.now)

    def send(self, orders: Iterable[Order]) -> None:
        for device, command in orders:
            if self.is_broken:
                raise KeyboardInterrupt  # the process dies between writing down and sending
            self.sent.append((device, command))
            self.boards[device].queue.append(command)

    def live(self) -> None:
        self.now += STEP_S
        with self.store.transaction():
            for board in self.boards.values():
                board.live(self.store, self.now)

    def start(self, **changes: object) -> Journal:
        plan = Plan(id="r1", channel="canary", name="m", version="2.0.0", release=NEW, created=self.now, limits=LIMITS)
        return Journal.create(self.root, replace(plan, **changes))

    def go_on(self, steps: int, *, until: str = "") -> None:
        for _ in range(steps):
            self.engine.step()
            self.live()
            if until and self.status == until:
                return

    @property
    def status(self) -> str:
        return self.journal().progress.status

    def journal(self) -> Journal:
        return Journal(self.root / "r1")

    def told(self, verb: str) -> set[DeviceId]:
        return {device for device, command in self.sent if command.verb == verb}

    def serving(self, release: int) -> int:
        return sum(board.release == release for board in self.boards.values())


@pytest.fixture
def world(tmp_path: Path):
    worlds: list[World] = []

    def make(kinds: Iterable[str]) -> World:
        worlds.append(World(tmp_path, kinds))
        return worlds[-1]

    yield make
    for made in worlds:
        made.store.close()


def test_a_good_release_reaches_all_stage_by_stage(world):
    fleet = world(["good"] * 20)
    fleet.start()
    sizes = set()
    for _ in range(60):
        fleet.engine.step()
        sizes.add(len(fleet.told("update")))
        fleet.live()
    assert fleet.status == "finished"
    assert fleet.serving(NEW) == 20
    assert 1 in sizes
    assert len(sizes) >= 4
    assert is_over(fleet.journal().progress, now=fleet.now)
    assert not fleet.told("rollback")


@pytest.mark.parametrize("kind", ["refuses", "would forget", "falls back", "slow", "errs", "drifts"])
def test_a_bad_release_reaches_the_canary_alone(world, kind):
    fleet = world([kind] * 20)
    fleet.start()
    fleet.go_on(60)
    assert fleet.status == "aborted"
    assert len(fleet.told("update")) == 1
    assert fleet.serving(OLD) == 20
    assert is_over(fleet.journal().progress, now=fleet.now)


def test_named_canaries_come_first(world):
    fleet = world(["good"] * 9 + ["refuses"])
    fleet.start(canaries=("lab/cam-009",))
    fleet.go_on(20)
    assert fleet.told("update") == {DeviceId("lab", "cam-009")}
    assert "golden features differ" in fleet.journal().progress.reason


def test_only_the_boards_that_are_meant_are_told(world):
    fleet = world(["good"] * 12)
    fleet.start(only=("lab/cam-00[0-4]",))
    fleet.go_on(80, until="finished")
    assert {device.device for device in fleet.told("update")} == {f"cam-00{n}" for n in range(5)}


def test_a_busy_board_is_told_again(world):
    fleet = world(["busy once"] * 3)
    fleet.start()
    fleet.go_on(80, until="finished")
    assert fleet.serving(NEW) == 3
    assert len(fleet.sent) == 6


def test_what_is_found_late_brings_all_back(world):
    """Every canary does well; of the second half, a third does not."""
    fleet = world(["good"] * 30)
    fleet.start(stages=parse_stages("10,100%"))
    fleet.go_on(4)
    first = fleet.told("update")
    assert len(first) == 10
    for device in list(set(fleet.boards) - first)[:7]:
        fleet.boards[device].kind = "slow"
    fleet.go_on(60)
    assert fleet.status == "aborted"
    assert fleet.serving(OLD) == 30
    assert is_over(fleet.journal().progress, now=fleet.now)


def test_a_board_that_was_away_comes_back_to_an_aborted_rollout_and_goes_back_too(world):
    fleet = world(["good"] * 10)
    fleet.start(stages=(Stage(share=1.0),), limits=replace(LIMITS, patience_s=1e6))
    fleet.go_on(3)
    away = list(fleet.boards.values())[:2]
    for board in away:
        assert board.release == NEW
        board.is_online = False
    journal = Journal(fleet.root / "r1")
    journal.append(Entry(time=fleet.now, kind="aborted", reason="somebody said so", by="ada"))
    fleet.go_on(20)
    assert fleet.serving(NEW) == 2
    assert not is_over(fleet.journal().progress, now=fleet.now)
    for board in away:
        board.is_online = True
    fleet.go_on(10)
    assert fleet.serving(NEW) == 0
    assert is_over(fleet.journal().progress, now=fleet.now)


def test_boards_that_are_away_pause_it_and_a_person_goes_on(world):
    fleet = world(["good"] * 10)
    fleet.start(stages=(Stage(share=1.0),))
    fleet.engine.step()
    for board in list(fleet.boards.values())[:5]:
        board.is_online = False
    fleet.go_on(40, until="paused")
    assert fleet.status == "paused"
    assert "5 of 10 boards are done with stage 1, 5 have not taken it" in fleet.journal().progress.reason
    assert len(fleet.told("update")) == 10
    for board in fleet.boards.values():
        board.is_online = True
    journal = Journal(fleet.root / "r1")
    journal.append(Entry(time=fleet.now, kind="resumed", by="ada"))
    fleet.go_on(40, until="finished")
    assert (fleet.status, fleet.serving(NEW)) == ("finished", 10)


def test_a_board_that_slept_over_its_command_is_no_failure(world):
    """The broker kept the command for it; it answers that this has expired."""
    fleet = world(["good"] * 10)
    fleet.start(stages=(Stage(share=1.0),), limits=replace(LIMITS, min_done=0.5, max_failed=0.0))
    fleet.engine.step()
    asleep = next(iter(fleet.boards.values()))
    asleep.is_online = False
    fleet.go_on(19)
    assert fleet.status == "running"
    asleep.is_online = True
    fleet.now += 2 * STEP_S
    fleet.live()
    assert [reply.ok for reply in asleep.obeyed.values()] == [False]
    fleet.go_on(3)
    assert (fleet.status, fleet.journal().progress.count("failed")) == ("finished", 0)


def test_a_board_that_slept_over_its_way_back_goes_back_when_it_wakes(world):
    fleet = world(["good"] * 3)
    fleet.start(stages=(Stage(share=1.0),), limits=replace(LIMITS, patience_s=300.0))
    fleet.go_on(3)
    for board in fleet.boards.values():
        assert board.release == NEW
        board.is_online = False
    Journal(fleet.root / "r1").append(Entry(time=fleet.now, kind="aborted", by="ada"))
    fleet.go_on(30)  # the commands to go back expire at the broker
    for board in fleet.boards.values():
        board.is_online = True
    fleet.go_on(10)
    assert fleet.serving(NEW) == 0
    assert is_over(fleet.journal().progress, now=fleet.now)


def test_a_board_that_will_not_go_back_is_named_in_the_end(world, monkeypatch):
    fleet = world(["good"] * 2)
    fleet.start(stages=(Stage(share=1.0),))
    fleet.go_on(4)
    for board in fleet.boards.values():
        monkeypatch.setattr(board, "_obey", lambda command, *_: Reply(id=command.id, ok=False, error="no way back"))
    Journal(fleet.root / "r1").append(Entry(time=fleet.now, kind="aborted", by="ada"))
    fleet.go_on(40)
    progress = fleet.journal().progress
    assert [(board.state, board.detail) for board in progress.boards.values()] == [("stuck", "no way back")] * 2
    assert len(fleet.sent) == 2 + 2 * MAX_REVERTS
    assert is_over(progress, now=fleet.now)


def test_a_board_that_never_answers_does_not_keep_a_rollout_open(world):
    fleet = world(["good"] * 10)
    fleet.start(stages=(Stage(share=1.0),))
    fleet.engine.step()
    next(iter(fleet.boards.values())).is_online = False
    fleet.go_on(60, until="finished")
    assert (fleet.status, fleet.serving(NEW)) == ("finished", 9)


def test_a_damaged_rollout_does_not_stop_the_others(world, caplog):
    fleet = world(["good"] * 3)
    (fleet.root / "a-broken").mkdir(parents=True)
    (fleet.root / "a-broken" / "plan.json").write_text("{")
    fleet.start()
    fleet.go_on(60, until="finished")
    assert fleet.serving(NEW) == 3
    assert "a-broken" in caplog.text
    assert [view["id"] for view in rollouts_view(fleet.root)] == ["r1"]


def test_a_board_that_joins_late_has_its_turn(world):
    fleet = world(["good"] * 6)
    fleet.start(stages=parse_stages("50%,100%"))
    fleet.go_on(3)
    late = DeviceId("lab", "late")
    fleet.boards[late] = FakeBoard(late)
    fleet.boards[late].be_born(fleet.store, fleet.now)
    fleet.go_on(80, until="finished")
    assert fleet.boards[late].release == NEW


def test_a_board_with_a_newer_release_is_left_alone(world):
    fleet = world(["good"] * 4)
    newer = fleet.boards[DeviceId("lab", "cam-001")]
    newer.release = 3
    newer.be_born(fleet.store, fleet.now)
    fleet.start(stages=(Stage(share=1.0),))
    fleet.go_on(60, until="finished")
    assert (newer.release, fleet.serving(NEW)) == (3, 3)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_an_engine_that_dies_anywhere_ends_as_one_that_does_not(tmp_path_factory, kinds, chance: random.Random):
    require_the_same_end(tmp_path_factory.mktemp("world"), kinds, chance)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_an_engine_that_dies_many_times_ends_as_one_that_does_not(tmp_path_factory, kinds, chance: random.Random):
    require_the_same_end(tmp_path_factory.mktemp("world"), kinds, chance)


def require_the_same_end(directory: Path, kinds: list[str], chance: random.Random) -> None:
    """The engine is killed after writing a line and before sending it, or between two steps; boards come and go."""
    fleet = World(directory, kinds)
    fleet.start(stages=parse_stages("1,50%,100%"))
    for _ in range(100):
        fleet.is_broken = chance.random() < 0.3
        try:
            fleet.engine.step()
        except KeyboardInterrupt:
            fleet.engine = fleet.new_engine()
        if chance.random() < 0.1:
            fleet.engine = fleet.new_engine()
        for board in fleet.boards.values():
            board.is_online = chance.random() < 0.9
        fleet.live()
    fleet.is_broken = False
    for board in fleet.boards.values():
        board.is_online = True
    fleet.go_on(60)
    progress, bad = fleet.journal().progress, sum(kind not in ("good", "busy once") for kind in kinds)
    if progress.status == "aborted":
        assert bad
        assert fleet.serving(NEW) == 0
        assert is_over(progress, now=fleet.now)
    elif progress.status == "finished":
        assert bad <= 0.1 * len(kinds)
        assert fleet.serving(NEW) == len(kinds) - bad
    else:
        assert progress.status == "paused"
    assert all(len(board.obeyed) <= 8 for board in fleet.boards.values())
    fleet.store.close()


# journals and plans


def test_a_line_that_a_crash_cut_off_is_ignored_and_the_next_one_is_whole(world):
    fleet = world(["good"])
    journal = fleet.start()
    with (fleet.root / "r1" / "journal.jsonl").open("ab") as file:
        file.write(b'{"time": 5, "kind": "abor')
    assert fleet.status == "running"
    journal.append(Entry(time=fleet.now, kind="paused", reason="tea"))
    assert fleet.status == "paused"
    assert [entry.kind for entry in fleet.journal().entries()] == ["started", "paused"]


def test_a_person_s_word_is_heard_by_an_engine_that_runs(world):
    fleet = world(["good"] * 5)
    journal = fleet.start()
    fleet.engine.step()
    journal.append(Entry(time=fleet.now, kind="paused", reason="wait", by="ada"))
    fleet.go_on(20)
    assert len(fleet.told("update")) == 1
    journal.append(Entry(time=fleet.now, kind="resumed", by="ada"))
    fleet.go_on(60, until="finished")
    assert fleet.status == "finished"


def test_a_name_is_used_once(world):
    fleet = world(["good"])
    fleet.start()
    with pytest.raises(FleetError, match="r1: is there already"):
        fleet.start()


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("1, 10%, 100%", (Stage(count=1), Stage(share=0.1), Stage(share=1.0))),
        ("3,20", (Stage(count=3), Stage(count=20))),
        ("0.5%", (Stage(share=0.005),)),
    ],
)
def test_stages_as_people_write_them(text, stages):
    assert parse_stages(text) == stages
    assert parse_stages(",".join(str(s).removesuffix("s").removesuffix(" board") for s in stages)) == stages


@pytest.mark.parametrize("text", ["", "0", "ten", "0%", "101%", "10%,5", "10%,10%", "5,3", "-1", "1,,2", "10 %%"])
def test_stages_that_make_no_sense_are_named(text):
    with pytest.raises(FleetError, match="stage"):
        parse_stages(text)


@given(st.integers(1, 300), st.text("abcdef", min_size=1, max_size=8))
def test_each_stage_holds_the_one_before_and_about_its_share(count, rollout):
    devices = [DeviceId("lab", f"cam-{number}") for number in range(count)]
    plan = Plan(id=rollout, channel="c", name="m", version="1", release=1, created=0.0)
    members = [plan.members(stage, devices) for stage in range(4)]
    for before, after in itertools.pairwise(members):
        assert after[: len(before)] == before
    assert len(members[0]) == 1
    assert set(members[3]) == set(devices)


def test_a_command_s_id_is_one_that_a_board_takes():
    plan = Plan(id="r" * 64, channel="c", name="m", version="1", release=1, created=0.0)
    first, other = (command_id(plan, "rollback", f"{'s' * 64}/{name * 64}", 12345) for name in "ab")
    assert is_command_id(first)
    assert first != other
