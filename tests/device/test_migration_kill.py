"""kill -9 while what was learned moves to another backbone: the old model with its state, or the new one with its own."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from device.contract.board import load_board
from device.contract.bundle import extract
from device.contract.manifest import ProjectorEntry
from device.serving import Serving
from device.slots import Slots
from tests.device.test_migration import Site
from tests.support.agent import Field
from tests.support.tiny_bundle import (
    LABELS,
    NEW_LABEL,
    TinyModel,
    make_frames,
    with_projector,
    write_bundle,
    write_frames,
)

KILLS, MANY_KILLS, AGENT_KILLS = 40, 1000, 30
RUNTIME = load_board("generic-x86-64").runtime
Way = tuple[ProjectorEntry, bytes]


@pytest.fixture
def staged(tmp_path: Path, tiny_model: TinyModel, other_model: TinyModel, projector: Way) -> Path:
    """A data directory with a taught class, where the new bundle lies in its slot and has not served yet."""
    site = Site(tmp_path, tiny_model)
    site.teach(4)
    bundle = write_bundle(tmp_path, other_model, release=2, **with_projector(*projector))
    stage(site.slots, bundle)
    return tmp_path / "root"


def stage(slots: Slots, bundle: Path) -> str:
    return slots.stage("hash-2", lambda directory: extract(bundle, directory)).slot


def install(root: Path, begin: Callable[[], None] = lambda: None) -> None:
    """What the agent does with a staged bundle, in this process."""
    serving = Serving(Slots(root), RUNTIME)
    serving.start()
    begin()
    serving.activate("b", "int8")
    serving.confirm()


def require_old_or_new(root: Path) -> str:
    """What a cut has left, as the next start finds it; returns which it is."""
    was = Slots(root).state("b").state
    slots = Slots(root)
    slots.recover(is_start=True)
    serving = Serving(slots, RUNTIME)
    serving.start()
    model = serving.model
    assert model is not None
    head = model.classifier.head
    assert (model.manifest.release, head.version) in ((1, 1), (2, 2)), was
    assert head.labels == (*LABELS, NEW_LABEL)
    assert not model.classifier.problems
    assert model.infer(make_frames(1, 4, seed=3)[0])[1].label == NEW_LABEL
    if serving.is_testing:  # the way back is open, too
        serving.revert(model, "engine", "it failed")
        assert (serving.model.manifest.release, serving.model.classifier.head.version) == (1, 1)
    return was


def test_a_cut_at_any_write_leaves_the_old_or_the_new(staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every call that reaches the disk, one after the other, is the last one."""
    seen: Counter[str] = Counter()
    for calls in range(200):
        root = copy(staged, tmp_path)
        with monkeypatch.context() as patch:
            count = cut_after(calls, patch)
            with contextlib.suppress(PowerCutError):
                install(root)
        seen[require_old_or_new(root)] += 1
        if count() <= calls:
            break
    assert seen["staged"] > 3
    assert seen["testing"]
    assert seen["confirmed"]


class PowerCutError(BaseException):
    """Not an Exception: nothing may handle it and go on."""


def cut_after(calls: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the power go at the call after so many; returns how many there were."""
    done = [0]

    def limited(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            done[0] += 1
            if done[0] > calls:
                raise PowerCutError
            return original(*arguments, **keywords)

        return call

    for name in ("fsync", "replace", "pwrite"):
        patch.setattr(f"os.{name}", limited(getattr(os, name)))
    return lambda: done[0]


def copy(staged: Path, tmp_path: Path) -> Path:
    root = tmp_path / "cut"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(staged, root, symlinks=True)
    return root


def kill_at_random(staged: Path, tmp_path: Path, kills: int) -> Counter[str]:
    """A process that installs, killed again and again; returns what the journal said of the new model's slot."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.device.test_migration_kill"])
    rng, seen = random.Random(5), Counter[str]()
    whole_s = max(killed(context, copy(staged, tmp_path), None) for _ in range(3))
    for _ in range(kills):
        root = copy(staged, tmp_path)
        killed(context, root, rng.uniform(0, 1.1) * whole_s)
        seen[require_old_or_new(root)] += 1
    return seen


def killed(context: multiprocessing.context.ForkServerContext, root: Path, after_s: float | None) -> float:
    """Install in a process that is killed so many seconds after it began, or not; returns how long it took."""
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=install_and_tell, args=(root, writer))
    process.start()
    reader.recv()
    started = time.monotonic()
    if after_s is not None:
        time.sleep(after_s)
        process.kill()
    process.join()
    return time.monotonic() - started


def install_and_tell(root: Path, writer: multiprocessing.connection.Connection) -> None:
    install(root, lambda: writer.send(True))


def test_a_process_that_is_killed_leaves_the_old_or_the_new(staged: Path, tmp_path: Path):
    seen = kill_at_random(staged, tmp_path, KILLS)
    print("\nkilled while the slot was:", dict(seen))
    assert seen["staged"]
    assert seen["testing"] + seen["confirmed"]


@pytest.mark.slow
def test_a_process_that_is_killed_many_times_leaves_the_old_or_the_new(staged: Path, tmp_path: Path):
    seen = kill_at_random(staged, tmp_path, MANY_KILLS)
    print("\nkilled while the slot was:", dict(seen))
    assert min(seen[state] for state in ("staged", "testing", "confirmed")) > 0


@pytest.mark.slow
def test_an_agent_that_is_killed_while_it_updates_keeps_what_was_taught(
    field: Field, other_model: TinyModel, projector: Way, tmp_path: Path
):
    field.cli("update")
    write_frames(field.directory / "photos", 10, 4)
    assert field.cli("learn", NEW_LABEL, field.directory / "photos").returncode == 0
    field.configure(update="check_interval_s = 0.01", runtime="soak_frames = 1000000\nsoak_s = 0.3\n")
    field.publish(2, model=other_model, **with_projector(*projector))
    before = shutil.copytree(field.root, tmp_path / "before", symlinks=True)
    whole_s, rng, seen = time_of_update(field), random.Random(6), Counter[str]()
    for _ in range(AGENT_KILLS):
        shutil.rmtree(field.root)
        shutil.copytree(before, field.root, symlinks=True)
        with field.agent() as agent:
            time.sleep(rng.uniform(0.3, 1.1) * whole_s)
            agent.kill()
        field.lose_power()
        seen[require_old_or_new(shutil.copytree(field.root, tmp_path / "copy", symlinks=True))] += 1
        shutil.rmtree(tmp_path / "copy")
    print("\nkilled while the slot was:", dict(seen))
    assert len(seen) >= 3


def time_of_update(field: Field) -> float:
    started = time.monotonic()
    with field.agent():
        while Slots(field.root).fallback().release != 2:
            assert time.monotonic() - started < 60, field.log
            time.sleep(0.02)
        return time.monotonic() - started
