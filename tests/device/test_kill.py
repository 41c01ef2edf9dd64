"""kill -9 of the agent at random moments of an update: the board always has a working, confirmed model afterwards."""

import random
import time

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
        seen.append((round(moment_s, 2), require_working_model(field)))
        if Slots(field.root).fallback().release == release:
            release += 1
            field.publish(release)
    print(f"\nan undisturbed update takes {whole_s:.2f} s; killed after (s, state left):", *seen)
    assert len({state for _, state in seen}) >= 3, "the kills hit too few states to prove anything"
    time_of_update(field, release=release)


def require_working_model(field: Field) -> str:
    """What a kill left, before anything repairs it: the model to fall back to is whole, and the link's model answers."""
    slots = Slots(field.root)
    verify_directory(slots.directory(slots.fallback().slot))
    serving = slots.serving()
    model = Model.load(slots, serving.slot, serving.precision, load_board("generic-x86-64").runtime)
    assert model.infer(make_frames(1, 2)[0])[1].label == LABELS[2]
    return slots.history()[-1].state


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
