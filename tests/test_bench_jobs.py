"""bench.jobs: nothing finished is measured again, nothing out of date is taken for current, nothing is lost when stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bench.jobs import Job, Table, digest_code, main_of, run_jobs
from host.errors import DataError


def make_jobs(*models: str, defined_by: str = "v1", **settings) -> list[Job]:
    return [Job(key={"model": model, "seed": 0}, settings=settings, defined_by=defined_by) for model in models]


def measure_length(job: Job) -> dict:
    return {"letters": len(job.key["model"])}


def count_rows(rows) -> str:
    return f"{len(rows)} rows up to date"


@pytest.fixture
def table(tmp_path):
    return Table(name="lengths", command="make", data="words", title="Lengths", directory=tmp_path, notes=count_rows)


class Measured:
    """Measures lengths and remembers of which jobs."""

    def __init__(self) -> None:
        self.models = []

    def __call__(self, job: Job) -> dict:
        self.models.append(job.key["model"])
        return measure_length(job)


def stored(table: Table) -> list[dict]:
    return table.record()["rows"]


def test_a_row_holds_its_key_what_was_measured_and_its_recipe(table):
    (job,) = make_jobs("vit")
    assert run_jobs(table, [job], measure_length) == [{"model": "vit", "seed": 0, "letters": 3, "recipe": job.recipe}]
    assert stored(table) == run_jobs(table, [job], measure_length)


def test_finished_jobs_are_not_measured_again(table):
    measured = Measured()
    run_jobs(table, make_jobs("vit", "mixer"), measured, only="mix")
    run_jobs(table, make_jobs("vit", "mixer", "deit"), measured)
    assert measured.models == ["mixer", "vit", "deit"]
    assert [row["model"] for row in stored(table)] == ["vit", "mixer", "deit"]


@pytest.mark.parametrize("changes", [{"defined_by": "v2"}, {"epochs": 5}])
def test_a_changed_job_is_measured_again_and_its_stale_row_replaced(table, changes):
    run_jobs(table, make_jobs("vit", "mixer"), measure_length)
    before = stored(table)
    jobs = [make_jobs("vit")[0], make_jobs("mixer", **changes)[0]]
    measured = Measured()
    run_jobs(table, jobs, measured)
    assert measured.models == ["mixer"]
    assert stored(table) == [before[0], before[1] | {"recipe": jobs[1].recipe}]


def test_stale_rows_stay_until_replaced_but_are_not_in_the_notes(table):
    run_jobs(table, make_jobs("vit", "mixer"), measure_length)
    rows = run_jobs(table, make_jobs("vit", "mixer", defined_by="v2"), measure_length, only="vit")
    assert [row["model"] for row in rows] == ["vit"]
    assert len(stored(table)) == 2
    assert "1 rows up to date" in (table.directory / "lengths.md").read_text()


def test_digest_of_code_follows_what_runs(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("def build():\n    return 4\n")
    before = digest_code(path)
    path.write_text('"""A model."""\n\n\ndef build():\n    """Build it."""\n    return 4  # blocks\n')
    assert digest_code(path) == before
    path.write_text("def build():\n    return 5\n")
    assert digest_code(path) != before


def test_a_job_that_fails_is_named_and_the_others_go_on(table, capsys):
    def measure(job: Job) -> dict:
        if job.key["model"] == "bad":
            raise ArithmeticError("loss is not finite")
        return measure_length(job)

    with pytest.raises(RuntimeError, match="1 of 3 jobs failed: bad / 0"):
        run_jobs(table, make_jobs("vit", "bad", "mixer"), measure)
    assert [row["model"] for row in stored(table)] == ["vit", "mixer"]
    assert "loss is not finite" in capsys.readouterr().err


def test_notes_are_written_anew_under_the_date_of_the_measurement(table):
    jobs = make_jobs("vit")
    run_jobs(table, jobs, measure_length)
    path = table.directory / "lengths.json"
    path.write_text(json.dumps(table.record() | {"date": "2001-02-03"}))
    run_jobs(table, jobs, measure_length)
    assert table.record()["date"] == "2001-02-03"


def test_sigterm_is_answered_as_before_afterwards(table):
    before = signal.getsignal(signal.SIGTERM)
    run_jobs(table, make_jobs("vit"), measure_length)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_measures_only_what_it_is_told_to(table, capsys):
    jobs = make_jobs("vit", "mixer")
    assert main_of(table, lambda: jobs, measure_length, ["--only", "mix"]) == 0
    assert [row["model"] for row in stored(table)] == ["mixer"]
    assert main_of(table, lambda: jobs, measure_length, []) == 0
    assert [row["model"] for row in stored(table)] == ["vit", "mixer"]


def test_the_command_answers_missing_data_with_one_line(table, capsys):
    def find_data() -> None:
        raise DataError("words.txt is missing")

    assert main_of(table, lambda: make_jobs("vit"), measure_length, [], prepare=find_data) == DataError.exit_code
    assert capsys.readouterr().err == "error: words.txt is missing\n"
    assert stored(table) == []


def test_the_command_says_that_it_was_stopped(table, capsys):
    def stop(job: Job) -> dict:
        raise KeyboardInterrupt

    assert main_of(table, lambda: make_jobs("vit"), stop, []) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_times_are_measured_by_one_process_only(table, capsys):
    with pytest.raises(SystemExit):
        main_of(table, list, measure_length, ["--workers", "2"], is_timed=True)
    assert "unrecognized arguments: --workers" in capsys.readouterr().err


SCRIPT = """
import os, sys, time
from pathlib import Path
from bench.jobs import Job, Table, run_jobs

def measure(job):
    if job.key["model"].startswith("slow"):
        Path(sys.argv[1], f"{os.getpid()}.worker").touch()
        time.sleep(60)
    return {"pid": os.getpid()}

if __name__ == "__main__":
    table = Table(name="lengths", command="make", data="words", title="Lengths", directory=Path(sys.argv[1]))
    jobs = [Job(key={"model": model}) for model in ("vit", "mixer", "slow vit", "slow mixer")]
    try:
        run_jobs(table, jobs, measure, workers=int(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def wait_until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("workers", "number", "status"),
    [(1, signal.SIGTERM, 130), (2, signal.SIGTERM, 130), (2, signal.SIGINT, 130), (2, signal.SIGKILL, -9)],
)
def test_a_stopped_run_keeps_its_rows_and_leaves_no_worker(table, tmp_path, workers, number, status):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script, tmp_path, str(workers)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.worker"))) == workers and len(stored(table)) == 2)
        process.send_signal(number)
        assert process.wait(timeout=30) == status
    finally:
        process.kill()
    assert [row["model"] for row in stored(table)] == ["vit", "mixer"]
    pids = [int(path.stem) for path in tmp_path.glob("*.worker")]
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_several_workers_are_other_processes_and_rows_keep_the_order_of_the_jobs(table):
    jobs = make_jobs("mixer", "vit", "deit")
    rows = run_jobs(table, jobs, measure_length, workers=2)
    assert [(row["model"], row["letters"]) for row in rows] == [("mixer", 5), ("vit", 3), ("deit", 4)]
