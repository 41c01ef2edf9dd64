"""Resumable lists of measurements for long tables: what is finished is stored at once and not measured again.

A job is a row of `bench/results/NAME.json`, or a few rows. They carry `recipe`, a hash of everything that defines the
job; a job whose recipe stands in the file already is skipped. When its definition changes it is measured again, and the old
row stays, out of date, until the new one replaces it. Rows that no job asks for any more are kept, at the end.

Ctrl-C and SIGTERM stop at once: finished rows are in the file, jobs under way are lost.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from bench.record import RESULTS, Row, write_results
from host.errors import HostError

RECIPE_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row to measure.

    Args:
        key: the first columns of the row, which together name it: strings, numbers, booleans or None.
        settings: what else the measurement is told; not shown in the table.
        defined_by: digest of the code behind it (`digest_code`, or `digest` of what it does).
    """

    key: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    defined_by: str = ""

    @property
    def label(self) -> str:
        return " / ".join(f"{value}" for value in self.key.values())

    @property
    def recipe(self) -> str:
        return digest(dict(self.key), dict(self.settings), self.defined_by)

    def describes(self, row: Row) -> bool:
        """Whether `row` is of this job, measured by whatever recipe."""
        return all(column in row and row[column] == value for column, value in self.key.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The results that jobs fill: the arguments of `write_results`, and notes made from the rows that are up to date."""

    name: str
    command: str
    data: str
    title: str
    notes: Callable[[Sequence[Row]], str] = lambda rows: ""
    seed: int | None = None
    directory: Path = RESULTS

    def record(self) -> dict[str, Any]:
        """What the file holds; no rows where there is no file."""
        path = self.directory / f"{self.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


Measure = Callable[[Job], Row | Sequence[Row]]


def digest(*parts: Any) -> str:
    """Short SHA-256 of anything JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:RECIPE_DIGITS]


def digest_code(*paths: Path) -> str:
    """Short SHA-256 of what Python files say: comments, docstrings and layout do not count."""
    return digest(*(_code(path) for path in paths))


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def main_of(
    table: Table,
    list_jobs: Callable[[], Sequence[Job]],
    measure: Measure,
    argv: Sequence[str] | None,
    *,
    prepare: Callable[[], Any] = lambda: None,
    is_timed: bool = False,
) -> int:
    """The command line of a table: measure what it lacks, and answer a stop or an error of ours with one line.

    Args:
        table: as for `run_jobs`.
        list_jobs: gives the jobs, once the command line is read.
        measure: as for `run_jobs`.
        argv: of the command; None: the process's own.
        prepare: what must succeed before any job, for example finding the data.
        is_timed: the rows are times, so there is no `--workers`: one process measures alone.

    Returns:
        The exit code: 130 when stopped.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{table.name}", description=f"{table.title}.")
    parser.add_argument("--only", default="", metavar="PART", help="measure only jobs with this in their label")
    if not is_timed:
        parser.add_argument("--workers", type=int, default=1, help="processes, each on one thread")
    options = parser.parse_args(argv)
    try:
        prepare()
        run_jobs(table, list_jobs(), measure, workers=1 if is_timed else options.workers, only=options.only)
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; finished rows are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def run_jobs(table: Table, jobs: Sequence[Job], measure: Measure, *, workers: int = 1, only: str = "") -> list[Row]:
    """Measure the jobs that the table lacks, in order; return its rows that are up to date.

    A job that raises is reported and left out, and the others go on.

    Args:
        table: where the rows go; its notes are written anew even when nothing is left to measure.
        jobs: all of them, the wanted and the finished, with keys of their own.
        measure: the other columns of a job's row, or rows. With several workers it must be importable by name.
        workers: processes, each on one thread; 1 measures in this process.
        only: part of the labels of the jobs to measure now; empty: all.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM.
        RuntimeError: jobs failed; the message lists them.
    """
    finished = {job.recipe for job in jobs} & {row.get("recipe") for row in table.record()["rows"]}
    pending = [job for job in jobs if job.recipe not in finished and only in job.label]
    failed = []
    print(f"{table.name}: {len(pending)} jobs to do, {len(finished)} of {len(jobs)} done before", flush=True)
    with _sigterm_interrupts():
        for number, (job, result) in enumerate(_results(pending, measure, workers), start=1):
            try:
                found = result()
                rows = [found] if isinstance(found, Mapping) else list(found)
            except Exception:  # one bad job must not cost the night's others
                traceback.print_exc()
                failed.append(job.label)
                continue
            _store(table, jobs, job, [{**job.key, **row, "recipe": job.recipe} for row in rows])
            print(f"{number} of {len(pending)}: {job.label}", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(pending)} jobs failed: {'; '.join(failed)}")
    return _rewrite(table, jobs)


def _store(table: Table, jobs: Sequence[Job], job: Job, rows: Sequence[Row]) -> None:
    others = [row for row in table.record()["rows"] if not job.describes(row)]
    _write(table, jobs, [*others, *rows])


def _rewrite(table: Table, jobs: Sequence[Job]) -> list[Row]:
    """Write today's notes under rows of an earlier day."""
    record = table.record()
    if not record["rows"]:
        return []
    measured = date.fromisoformat(record["date"])
    return _write(table, jobs, record["rows"], machine=record["machine"], today=lambda: measured)


def _write(table: Table, jobs: Sequence[Job], rows: Sequence[Row], **known: Any) -> list[Row]:
    order = {job.recipe: position for position, job in enumerate(jobs)}
    rows = sorted(rows, key=lambda row: order.get(row.get("recipe"), len(order)))
    current = [row for row in rows if row.get("recipe") in order]
    write_results(
        table.name,
        command=table.command,
        seed=table.seed,
        data=table.data,
        rows=rows,
        title=table.title,
        notes=table.notes(current),
        directory=table.directory,
        **known,
    )
    return current


def _results(
    jobs: Sequence[Job], measure: Measure, workers: int
) -> Iterator[tuple[Job, Callable[[], Row | Sequence[Row]]]]:
    """Each job as it gets ready, with the function that gives its row or raises its error."""
    if workers == 1:
        yield from ((job, partial(measure, job)) for job in jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # for the children: read when they import NumPy and PyTorch
    executor = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_initialize_worker
    )
    try:
        futures = {executor.submit(measure, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _initialize_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # a parent that was killed leaves its workers waiting for ever


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
