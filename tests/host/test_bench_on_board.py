"""`fieldvit bench --on`: queries in a board's own runtime over a real sshd, and what is said where that cannot be."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.contract.manifest import InputSpec
from host.bench.board_job import BATCH_SIZE, LabeledFrames
from host.cli import main
from host.data.inputs import to_input
from tests.host.test_bench import RECIPE, crashing
from tests.support.agent import DEVICE_PYTHON, REPO_ROOT
from tests.support.sshd import SshServer, ssh_server
from tests.support.tiny_bundle import TinyModel, convert_tiny_model, write_bundle

PYTHON = DEVICE_PYTHON if DEVICE_PYTHON.exists() else Path(sys.executable)

BOARD_PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with ssh_server() as server:
        yield server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return convert_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tflite(tiny: TinyModel, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny.tflite)
    return path


@pytest.fixture
def board(server: SshServer, request: pytest.FixtureRequest) -> Path:
    """A data directory with a runtime: the system's Python with our packages, where that user may read them."""
    root = server.home / request.node.name
    program = root / "runtime" / "current" / "bin" / "python"
    packages = ":".join(path for path in sys.path if path.endswith("site-packages"))
    lines = ["#!/bin/sh", f'export PYTHONPATH="{REPO_ROOT}:{packages}"', f'exec {BOARD_PYTHON} "$@"']
    server.run("mkdir", "-p", str(program.parent))
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)
    if server.run(str(program), "-c", "import device.engine").returncode:
        pytest.skip("the board's user cannot run this environment's packages")
    return root


def bench(capsys: pytest.CaptureFixture[str], server: SshServer, root: Path, *arguments: object):
    words = [*map(str, arguments), "--on", f"ssh:{server.user}@127.0.0.1:{server.port}{root}"]
    words += ["--ssh-key", str(server.key), "--known-hosts", str(server.known_hosts), "--python", BOARD_PYTHON]
    code = main(["bench", *words])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_a_bundle_is_measured_on_the_board_with_its_test_images(capsys, server, board, tiny, tflite, tmp_path):
    bundle = write_bundle(tmp_path, tiny, provenance={"recipe": RECIPE})
    code, out, err = bench(capsys, server, board, bundle, "--vs", tflite, "--queries", 10, "--json")
    assert code == 0, err
    there = json.loads(out)
    assert [row["artifact"] for row in there["rows"]] == ["int8", "float32", ""]
    assert (there["queries"], there["is_on_board"]) == (10, True)
    assert all(row["p50_ms"] > 0 and row["peak_memory_bytes"] > 10e6 for row in there["rows"])
    assert {row["partitions"] for row in there["rows"]} == {None}
    assert "measured on the board, in its own runtime" in there["notes"][1]
    assert main(["bench", str(bundle), "--queries", "1", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    for one, other in zip(there["rows"], here["rows"], strict=False):
        assert (one["accuracy"], one["accuracy_images"]) == (other["accuracy"], other["accuracy_images"])
    assert [path.name for path in board.iterdir()] == ["runtime"] or not list((board / "incoming").iterdir())


def test_a_file_that_kills_the_runtime_there_is_named(capsys, server, board, tflite):
    code, out, err = bench(capsys, server, board, tflite, "--vs", crashing(tflite), "--queries", 2)
    assert (code, out) == (15, "")
    assert "crash.tflite crashed the runtime at query 1 (SIGSEGV" in err.splitlines()[-1]
    assert not list(board.glob("bench-*"))


def test_a_board_without_a_runtime_says_what_brings_it(capsys, server, tflite):
    root = server.home / "empty"
    server.run("mkdir", str(root))
    code, _, err = bench(capsys, server, root, tflite)
    assert code == 15
    assert f"no runtime in {root}; flash a bundle there first" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("on", "message"),
    [("pi@cam", "--on 'pi@cam': write ssh:USER@HOST"), ("ssh:cam", "--on 'ssh:cam': write ssh:USER@HOST")],
)
def test_odd_addresses_are_refused_before_anything_is_measured(capsys, tflite, on, message):
    assert main(["bench", str(tflite), "--on", on]) == 15
    assert message in capsys.readouterr().err


def test_the_archive_runs_without_the_host(server, tmp_path):
    """Only what `host.bench.board_job` imports goes, and nothing of it needs torch."""
    from host.bench.on_board import _pack

    archive = _pack(tmp_path / "bench.pyz")
    assert archive.read_bytes() == _pack(tmp_path / "again.pyz").read_bytes()
    (tmp_path / "job.json").write_text('{"entries": [], "queries": 1}')
    done = subprocess.run(
        [PYTHON, archive, tmp_path],
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: job: missing key ")


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=2 * BATCH_SIZE),
    seed=st.integers(0, 2**32 - 1),
)
def test_images_arrive_as_they_were(tmp_path_factory, sizes, seed):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    head = rng.standard_normal((4, 2), np.float32), rng.standard_normal(2, np.float32)
    path = tmp_path_factory.mktemp("data") / "0.npz"
    LabeledFrames(images=images, labels=rng.integers(0, 2, len(images)), head=head).save(path)
    loaded = LabeledFrames.load(path)
    assert all(np.array_equal(one, other) for one, other in zip(loaded.images, images, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(loaded.head, head, strict=True))
    spec = InputSpec(width=6, height=5, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert np.array_equal(np.concatenate(list(loaded.batches(spec))), to_input(images, spec))
