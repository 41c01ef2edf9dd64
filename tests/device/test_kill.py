"""kill -9 of the agent at random moments of an update: the board always has a working, confirmed model afterwards."""

import os
import random
import shutil
import time
from pathlib import Path

from device.contract.board import load_board
from device.contract.bundle import verify_directory
from device.serving import Model
from device.slots import Slots
from tests.support.agent import Field
from tests.support.tiny_bundle import LABELS, make_frames, write_frames

KILLS = 20
RUNTIME = "telemetry_interval_s = 0.2\nsoak_frames = 1000000\nsoak_s = 0.2\n"


def test_a_board_that_is_killed_during_updates_always_has_a_model(field: Field):
    assert field.cli("update").returncode == 0
    field.configure(update="check_interval_s = 0.01", runtime=RUNTIME)
    write_frames(field.root / "frames", 3, 0)
    whole_s = time_of_update(field, release=2)
    rng, release, seen = random.Random(7), 3, []
    field.publish(release)
    for _ in range(KILLS):
        moment_s = rng.uniform(0.2, 1.1) * whole_s
        with field.agent() as agent:
            time.sleep(moment_s)
            agent.kill()
        field.lose_power()
        seen.append((round(moment_s, 2), require_working_model(field)))
        if Slots(field.root).fallback().release == release:
            release += 1
            field.publish(release)
    print(f"\nan undisturbed update takes {whole_s:.2f} s; killed after (s, state left):", *seen)
    assert len({state for _, state in seen}) >= 3, "the kills hit too few states to prove anything"
    time_of_update(field, release=release)


def require_working_model(field: Field) -> str:
    """What a kill left, before anything repairs it: the model to fall back to is whole, and so is the link's.

    The link follows the journal, so a kill can leave it one step behind; the next start moves it to the served slot.
    """
    slots = Slots(field.root)
    verify_directory(slots.directory(slots.fallback().slot))
    for slot in {linked_slot(field.root), slots.serving().slot}:
        require_answer(slots, slot)
    copy = field.directory / "started-again"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(field.root, copy, symlinks=True, ignore=shutil.ignore_patterns("spool.db*", "frames", "downloads"))
    after = Slots(copy)
    after.recover(is_start=True)
    assert linked_slot(copy) == after.serving().slot
    require_answer(after, linked_slot(copy))
    return slots.history()[-1].state


def linked_slot(root: Path) -> str:
    link = os.readlink(root / "current")
    assert link in ("slots/a", "slots/b")
    return Path(link).name


def require_answer(slots: Slots, slot: str) -> None:
    model = Model.load(slots, slot, slots.state(slot).precision or "int8", load_board("generic-x86-64").runtime)
    assert model.infer(make_frames(1, 2)[0])[1].label == LABELS[2]


def time_of_update(field: Field, *, release: int) -> float:
    """Seconds from the agent's start until it has confirmed the release."""
    if release == 2:
        field.publish(release)
    started = time.monotonic()
    with field.agent():
        while Slots(field.root).fallback().release != release:
            assert time.monotonic() - started < 30, field.log
            time.sleep(0.02)
        return time.monotonic() - started
