"""The model of a disk that loses what was not synced finds careless writers and clears careful ones; then the agent itself."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.disk_log import DiskLog, Files, Name, Sync, Write, can_trace, crash_state, read_log, snapshot, trace_command
from bench.power_cut import KILL, LOST, PHASES, list_jobs, measure
from host.errors import BenchError

needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is not installed, or may not trace here")
ROOT = Path(__file__).parents[1]
CARELESS = "open(ROOT + '/x.tmp', 'wb').write(b'new' * 100); os.replace(ROOT + '/x.tmp', ROOT + '/x')"
CAREFUL = "from device.contract.files import write_atomic; write_atomic(Path(ROOT) / 'x', b'new' * 100)"
DEEP = "from device.contract.files import write_atomic; write_atomic(Path(ROOT) / 'a' / 'b' / 'x', b'new' * 100)"
OLD, NEW = b"old", b"new" * 100


def record(tmp_path: Path, script: str) -> DiskLog:
    root = tmp_path / "a root"
    root.mkdir()
    (root / "x").write_bytes(OLD)
    before = snapshot(root)
    program = f"import os\nfrom pathlib import Path\nROOT = {str(root)!r}\n{script}"
    command = trace_command(tmp_path / "log", [sys.executable, "-c", program])
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    return read_log(tmp_path / "log", root, before)


def contents(log: DiskLog, name: str, counts: list[int]) -> set[bytes | None]:
    """What a file may hold after the power went."""
    rng, found = random.Random(0), set()
    for count in counts:
        for keep in [0.0, 1.0] + [0.5] * 100:
            files = crash_state(log, count, rng, keep=keep)
            inode = files.names.get(name)
            found.add(bytes(files.contents[inode]) if isinstance(inode, int) else None)
    return found


@needs_strace
def test_a_careless_writer_is_found(tmp_path: Path):
    log = record(tmp_path, CARELESS)
    found = contents(log, "x", [len(log.operations)])
    assert {OLD, NEW, b""} < found
    assert bytes(300) in found
    assert any(content not in (OLD, NEW, b"", bytes(300)) for content in found)  # torn


@needs_strace
def test_an_atomic_write_is_the_old_or_the_new_and_then_the_new(tmp_path: Path):
    log = record(tmp_path, CAREFUL)
    assert contents(log, "x", list(range(len(log.operations) + 1))) == {OLD, NEW}
    assert contents(log, "x", [len(log.operations)]) == {NEW}


@needs_strace
def test_an_atomic_write_into_a_new_directory_stays(tmp_path: Path):
    log = record(tmp_path, DEEP)
    files = [crash_state(log, len(log.operations), random.Random(seed)) for seed in range(100)]
    for number, state in enumerate(files):
        state.write_to(tmp_path / f"state {number}")
        assert (tmp_path / f"state {number}" / "a" / "b" / "x").read_bytes() == NEW


@needs_strace
def test_what_all_calls_left_is_what_is_there(tmp_path: Path):
    script = """
import shutil, threading
os.mkdir(ROOT + "/d"); open(ROOT + "/d/y", "w").write("1"); os.symlink("d/y", ROOT + "/l")
os.rename(ROOT + "/d", ROOT + "/e"); open(ROOT + "/e/y", "r+").truncate(0); open(ROOT + "/e/z", "w").write("2")
with open(ROOT + "/w", "wb", buffering=0) as file:
    file.write(b"abcdef"); file.seek(2); file.write(b"X"); os.pwrite(file.fileno(), b"YZ", 7)
with open(ROOT + "/w", "ab", buffering=0) as file:
    file.write(b"more"); file.write(b"!")
os.mkdir(ROOT + "/gone"); open(ROOT + "/gone/y", "w"); shutil.rmtree(ROOT + "/gone")
threads = [threading.Thread(target=lambda n=n: open(f"{ROOT}/t{n}", "w").write(str(n))) for n in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
"""
    log = record(tmp_path, script)
    crash_state(log, len(log.operations), random.Random(0), keep=1.0).write_to(tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "a root")
    assert (tmp_path / "again" / "w").read_bytes() == b"abXdef\0YZmore!"


def tree(root: Path) -> dict[str, object]:
    return {
        path.relative_to(root).as_posix(): path.readlink() if path.is_symlink() else path.is_dir() or path.read_bytes()
        for path in root.rglob("*")
    }


@needs_strace
def test_what_is_not_modelled_is_said(tmp_path: Path):
    with pytest.raises(BenchError, match=r"link on .* is not modelled"):
        record(tmp_path, "os.link(ROOT + '/x', ROOT + '/y')")


def test_changes_of_one_name_keep_their_order_and_others_need_not():
    operations = [
        Name(kind="create", path="a", inode=1),
        Write(inode=1, offset=0, data=b"1"),
        Name(kind="rename", path="a", target="b"),
        Name(kind="create", path="c", inode=2),
    ]
    log = DiskLog(before=Files(), operations=operations, durable_at=[4] * 4)
    seen = {frozenset(crash_state(log, 4, random.Random(seed)).names) for seed in range(200)}
    assert seen == {frozenset(names) for names in [(), ("a",), ("b",), ("c",), ("a", "c"), ("b", "c")]}


def test_a_sync_covers_only_what_stood_before_it_and_only_its_file():
    from bench.disk_log import _durable_at

    operations = [
        Write(inode=1, offset=0, data=b"1"),
        Write(inode=2, offset=0, data=b"2"),
        Write(inode=1, offset=1, data=b"3"),
        Sync(upto=2, inode=1),
        Name(kind="mkdir", path="d"),
        Name(kind="mkdir", path="d/e"),
        Sync(upto=6, directory=""),
    ]
    assert _durable_at(operations) == [3, 7, 7, 7, 6, 7, 7]


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("cut", [KILL, LOST])
@pytest.mark.parametrize("phase", PHASES)
def test_the_agent_at_a_twentieth_of_the_scale(cut: str, phase: str):
    (job,) = [job for job in list_jobs(12) if job.key == {"cut": cut, "phase": phase}]
    row = measure(job)
    assert (row["kills"], row["broken"], row["half_applied"]) == (12, 0, 0)
    assert row["worst_restart_s"] < 10  # two seconds on an idle machine, which a test's need not be
