"""What does a board do with damaged bundles? The table `damaged_bundles`.

    python -m bench.damaged_bundles [--only PART_OF_A_NAME] [--workers N]

A board serves release 1 of a small model that really runs. It is offered a damaged release 2, thousands of times, from a
signed repository: one part is damaged behind the signature, the other before it was signed, so that signatures and hashes
are right. What the board's agent does is done here by its own code, self-test in a child process included; only syncing to
the disk is left out. `loaded`: the bundle was taken and serves. `outside`: it serves, though its golden outputs are not
those of the sound bundle within the sound bundle's tolerance. `crashes`: the agent ended, raised something it does not
answer for, or lost its model. A mutation may leave everything right that the board looks at, such as a bit in the last digit
of a weight, or a file that it does not read: such a bundle is loaded, and should be.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.damage import BEFORE_SIGNING, ON_THE_WAY, Mutation, Sound
from bench.jobs import Job, Table, main_of
from bench.record import Row
from bench.sources import digest_of

BEFORE, BEHIND = "before signing", "behind the signature"
COUNTS = {BEHIND: 320, BEFORE: 125}
"""Bundles of each mutation: 2,560 behind the signature and 2,625 before it."""
SEED = 7
NAME = "tiny-2.0.0.fieldvit"
HANG_S = 400.0
JUDGED_BY = (
    "bench.damage",
    "bench.damaged_bundles",
    "device.updater",
    "device.serving",
    "device.selftest",
    "device.tuf_client",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one damaged bundle: why it was refused, or how it serves, or how the agent came to harm."""

    reason: str = ""
    is_outside: bool = False
    crash: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    table = Table(
        name="damaged_bundles",
        command="python -m bench.damaged_bundles",
        seed=SEED,
        data="a model of 8 x 8 pixels and 16 features that the tests convert, and its bundle",
        title="Damaged bundles and the device agent",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv)


def list_jobs(scale: int = 1) -> list[Job]:
    """One job for each mutation; `scale` divides how many bundles."""
    return [
        Job(
            key={"mutation": name, "damaged": when},
            settings={"count": max(COUNTS[when] // scale, 1), "seed": SEED},
            defined_by=digest_of(*JUDGED_BY),
        )
        for when, mutations in ((BEHIND, ON_THE_WAY), (BEFORE, BEFORE_SIGNING))
        for name in mutations
    ]


def measure(job: Job) -> Row:
    """Offer a board so many bundles of one mutation."""
    name, when = str(job.key["mutation"]), str(job.key["damaged"])
    count = int(job.settings["count"])
    with tempfile.TemporaryDirectory() as directory:
        outcomes = list(_outcomes(Path(directory), name, when, count))
    reasons = Counter(outcome.reason for outcome in outcomes if outcome.reason)
    crashes = [outcome.crash for outcome in outcomes if outcome.crash]
    for crash in crashes:
        print(f"{name}: {crash}", file=sys.stderr, flush=True)
    return {
        "tried": count,
        "refused": sum(reasons.values()),
        "loaded": count - sum(reasons.values()) - len(crashes),
        "outside": sum(outcome.is_outside for outcome in outcomes),
        "crashes": len(crashes),
        "reasons": ", ".join(f"{reason} {number}" for reason, number in reasons.most_common()),
    }


def _notes(rows: Sequence[Row]) -> str:
    tried, signed = sum(row["tried"] for row in rows), sum(row["tried"] for row in rows if row["damaged"] == BEFORE)
    return (
        f"{tried} bundles, {signed} of them damaged before signing: {sum(row['loaded'] for row in rows)} were loaded, "
        f"{sum(row['outside'] for row in rows)} of them with golden outputs outside of the tolerance; "
        f"{sum(row['crashes'] for row in rows)} crashes of the agent.\n\n"
        "`loaded` are bundles in which the mutation left right all that the board looks at. The last column counts the "
        "reasons of refusals, as events and `fieldvit-device status --history` give them."
    )


def _outcomes(directory: Path, name: str, when: str, count: int) -> Iterator[Outcome]:
    """One outcome for each bundle; a process that dies of one is replaced for the next."""
    model = _tiny_model()
    done = 0
    while done < count:
        with _agent(model, directory / str(done), name, when, range(done, count)) as results:
            while done < count:
                try:
                    outcome = results.recv() if results.poll(HANG_S) else Outcome(crash=f"hung for {HANG_S:.0f} s")
                except EOFError:
                    outcome = Outcome(crash="the agent's process ended")
                done += 1
                yield outcome
                if outcome.crash:
                    break


@contextmanager
def _agent(model: Any, directory: Path, name: str, when: str, numbers: range) -> Iterator[Connection]:
    """The process that plays the agent; it is ended with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_play_agent, args=(theirs, model, directory, name, when, numbers))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _play_agent(results: Connection, model: Any, directory: Path, name: str, when: str, numbers: range) -> None:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # nothing here is about power cuts
    stage = Stage(model, directory)
    mutation = {**ON_THE_WAY, **BEFORE_SIGNING}[name]
    for number in numbers:
        seed = [SEED, *name.encode(), number]
        results.send(stage.offer(mutation, np.random.default_rng(seed), is_signed=when == BEFORE))


class Stage:
    """A board that serves release 1, and a repository that offers what it is told to."""

    def __init__(self, model: Any, directory: Path) -> None:
        from tests.support.agent import Field
        from tests.support.tiny_bundle import bundle_files, write_bundle

        directory.mkdir(parents=True)
        self._directory, self._model = directory, model
        self._field = Field.create(directory, model)
        self._field.configure(top='precision = "int8"')
        self._field.publish(1)
        self._sound = Sound(
            bundle=write_bundle(directory, model, release=2).read_bytes(),
            files=bundle_files(model),
            other=(directory / "tiny-1.0.0.fieldvit").read_bytes(),
        )
        serving, slots = self._look(self._field.root, directory / "repo")
        if slots.state("a").state != "confirmed" or not self._answers_rightly(serving):
            raise RuntimeError("the sound bundle was not installed; nothing can be said about damaged ones")

    def offer(self, mutation: Mutation, rng: np.random.Generator, *, is_signed: bool) -> Outcome:
        """Offer one damaged bundle to a fresh copy of the board."""
        from device.contract.errors import DeviceError
        from device.verbs import refusal_reason

        root, repository = self._directory / "trial-root", self._directory / "trial-repo"
        for source, copy in ((self._field.root, root), (self._directory / "repo", repository)):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy, symlinks=True)
        content = mutation(self._sound, rng)
        target = self._sign(repository, content if is_signed else self._sound.bundle)
        target.write_bytes(content)
        try:
            serving, slots = self._look(root, repository)
        except DeviceError as error:
            return self._after_refusal(root, refusal_reason(error), str(error))
        except Exception:  # this is what is being looked for
            return Outcome(crash=traceback.format_exc())
        entry = slots.serving()
        if entry is None or entry.state != "confirmed":
            return Outcome(crash=f"the board is left with {entry}")
        if entry.release == 1:  # the offer was the bundle that serves: nothing was to be done, or it was reverted
            reason = slots.state("b").reason or "up to date"
            return self._after_refusal(root, reason, "reverted")
        return Outcome(is_outside=not self._answers_rightly(serving))

    def _look(self, root: Path, repository: Path) -> Any:
        """What the agent does at a look for updates, up to the confirmation."""
        from device.config import load_config, resolve_runtime
        from device.contract.board import load_board
        from device.serving import Serving
        from device.slots import Slots
        from device.updater import Updater
        from device.verbs import install

        config = load_config(root)
        board = load_board(config.board)
        slots = Slots(root)
        slots.recover(is_start=False)
        serving = Serving(slots, resolve_runtime(board, config.runtime))
        serving.start()
        if install(Updater(root, config, board, slots), serving, repository, force=False):
            for frame in self._model.golden["frames"]:
                serving.model.infer(frame)
            serving.confirm()
        return serving, slots

    def _after_refusal(self, root: Path, reason: str, text: str) -> Outcome:
        """The model before must serve on, and a reason must be given."""
        from device.config import load_config, resolve_runtime
        from device.contract.board import load_board
        from device.serving import Serving
        from device.slots import Slots

        slots = Slots(root)
        slots.recover(is_start=True)
        serving = Serving(slots, resolve_runtime(load_board("generic-x86-64"), load_config(root).runtime))
        serving.start()
        if not reason or not text or serving.model is None or not self._answers_rightly(serving):
            return Outcome(crash=f"refused ({reason}: {text}), but release 1 does not serve any more")
        return Outcome(reason=reason)

    def _answers_rightly(self, serving: Any) -> bool:
        """Whether the golden frames get the sound bundle's features, within its tolerance, and its answers."""
        from tests.support.tiny_bundle import LABELS, make_manifest

        golden = self._model.golden
        expected, logits = golden["int8/features"], golden["int8/logits"]
        tolerance = make_manifest(self._sound.files).artifacts[0].golden_tolerance * np.abs(expected).max()
        for frame, features, scores in zip(golden["frames"], expected, logits, strict=True):
            found, answer = serving.model.infer(frame)
            if not np.abs(found - features).max() <= tolerance or answer.label != LABELS[int(scores.argmax())]:
                return False
        return True

    def _sign(self, repository: Path, content: bytes) -> Path:
        """Sign for any bytes, as `fieldvit publish` would not; returns where they lie."""
        import json

        from tuf.api.metadata import TargetFile

        from host.fleet.metadata import Signing, read_current
        from host.fleet.repository import target_path

        current = read_current(repository)
        pointer = json.dumps({"schema": 1, "bundle": NAME, "release": 2}).encode()
        for name, data in ((NAME, content), ("channels/stable.json", pointer)):
            target = current.targets.targets[name] = TargetFile.from_data(name, data, ["sha256"])
            path = repository / target_path(name, target.hashes["sha256"])
            path.write_bytes(data)
        Signing(repository, self._field.repository.keys, [current.root]).commit(current.targets)
        return repository / target_path(NAME, current.targets.targets[NAME].hashes["sha256"])


@cache
def _tiny_model() -> Any:
    from tests.support.tiny_bundle import convert_tiny_model

    with tempfile.TemporaryDirectory() as directory:
        return convert_tiny_model(Path(directory))


if __name__ == "__main__":
    sys.exit(main())
