"""`fieldvit bench`: real files in real runtimes, files that kill their runtime, and the statistics."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import flatbuffer
from host.bench.measure import FIRST_LOOK, WARM_UP, Extent, Times, measure
from host.bench.process import Worker, last_words
from host.bench.result import BUSY
from host.bench.runtimes import Subject, random_samples
from host.bench.statistics import percentiles_ms, ratio_of_medians, waiting
from host.cli import main
from host.errors import BenchError
from tests.support.tiny_bundle import TinyModel, convert_tiny_model, write_bundle

RECIPE = {
    "name": "tiny",
    "task": "classify",
    "data": {"source": "digits", "held_back": ["4", "5", "6", "7", "8", "9"]},  # four classes, as the tiny model has
    "model": {"family": "cnn", "variant": "small"},
    "train": {"epochs": 1},
    "quantize": {},
    "continual": {},
    "export": {"boards": ["generic-x86-64"]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyModel:
    return convert_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tflite(tiny, tmp_path) -> Path:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny.tflite)
    return path


def crashing(tflite: Path) -> Path:
    """A file that loads, and kills the interpreter at its first query: a convolution without its bias."""
    model, path = flatbuffer.read_model(tflite), tflite.with_name("crash.tflite")
    model.subgraphs[0].operators[0].inputs = [0, 5]
    flatbuffer.write_model(model, path)
    return path


def bench(capsys, *arguments):
    code = main(["bench", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_files_are_measured_beside_each_other(capsys, tflite):
    code, out, _ = bench(capsys, tflite, "--vs", tflite, "--queries", 20, "--json")
    record = json.loads(out)
    assert (code, record["queries"], record["warm_up"]) == (0, 20, WARM_UP)
    for row in record["rows"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["artifact_bytes"] == tflite.stat().st_size < row["peak_memory_bytes"]
        assert (row["accuracy"], row["partitions"], row["outside"]) == (None, 1, {})
    assert record["rows"][0]["ratio"] == record["rows"][0]["ratio_low"] == record["rows"][0]["ratio_high"] == 1
    assert record["command"] == f"fieldvit bench {tflite} --vs {tflite} --queries 20 --threads 1"


def test_what_was_measured_is_said_beside_the_table(capsys, tflite):
    code, out, _ = bench(capsys, tflite)
    assert code == 0
    assert f"{FIRST_LOOK} queries of each file" in out
    assert "a first look" in out
    assert "a first look" not in bench(capsys, tflite, "--queries", 1024)[1]


def test_a_bundle_is_measured_with_its_test_images(capsys, tiny, tflite, tmp_path):
    bundle = write_bundle(tmp_path, tiny, provenance={"recipe": RECIPE})
    code, out, err = bench(capsys, bundle, "--vs", tflite, "--queries", 10, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["artifact"] for row in rows] == ["int8", "float32", ""]
    assert rows[0]["accuracy"] == rows[1]["accuracy"]  # of the same bytes
    assert 0 < rows[0]["accuracy"] < 1  # it was made for quadrants, not digits
    assert rows[0]["accuracy_images"] > 50
    assert rows[2]["accuracy"] is None


def test_reports_hold_the_same_figures_and_fetch_nothing(capsys, tflite, tmp_path):
    out = tmp_path / "new" / "out"
    code, text, _ = bench(capsys, tflite, "--vs", tflite, "--queries", 20, "--out", out)
    page, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert code == 0
    p50 = re.search(r"tiny\.tflite +– +(\d+\.\d{3})", text)
    assert p50
    for report in (page, markdown):
        assert p50[1] in report
        assert all(word in report for word in ("fieldvit bench", "20 queries", "cpu", "date", "ratio"))
    assert "<svg" in page
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|data:)[^"]*"', page)


def test_a_file_that_kills_its_runtime_is_named(capsys, tflite):
    code, out, err = bench(capsys, tflite, "--vs", crashing(tflite))
    assert (code, out) == (BenchError.exit_code, "")
    assert err.splitlines()[-1].startswith(f"error: {crashing(tflite)} crashed the runtime at query 1 (SIGSEGV")


def test_a_file_that_does_not_load_is_named_with_the_reason(capsys, tflite):
    broken = tflite.with_name("broken.tflite")
    broken.write_bytes(tflite.read_bytes()[:200])
    _, out, err = bench(capsys, tflite, "--vs", broken)
    assert out == ""
    assert re.search(rf"error: {broken} failed while it was loaded: .*[Ff]latbuffer", err.splitlines()[-1])


def test_a_worker_that_is_killed_in_the_middle_is_told(tflite):
    with Worker(Subject(name="victim", path=tflite, runtime="tflite")) as worker:
        worker.query()
        worker._process.kill()
        with pytest.raises(BenchError, match=r"victim crashed the runtime at query 2 \(SIGKILL\)"):
            worker.query()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.tflite",), "no.tflite: no such file"),
        (("no.fieldvit",), "no.fieldvit: no such bundle"),
        (("tiny.tflite", "--vs", "no.onnx"), "no.onnx: no such file"),
        (("tiny.tflite", "--queries", "0"), "Invalid value for '--queries'"),
        (("tiny.tflite", "--threads", "0"), "Invalid value for '--threads'"),
        (("tiny.tflite", "--out", "tiny.tflite"), "tiny.tflite: File exists"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(capsys, tflite, monkeypatch, arguments, message):
    monkeypatch.chdir(tflite.parent)
    code, out, err = bench(capsys, *arguments)
    assert code != 0
    assert out == ""
    (line,) = err.splitlines()
    assert message in line


@pytest.mark.skipif(find_spec("onnxruntime") is not None, reason="onnxruntime is installed")
def test_onnx_without_its_runtime_says_what_to_install(capsys, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"any")
    assert "pip install onnxruntime" in bench(capsys, tmp_path / "model.onnx")[2]


def test_onnx_is_measured_in_onnxruntime(capsys, tflite):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx, which writes the file, is not installed")
    path = tflite.with_name("double.onnx")
    write_onnx(onnx, path)
    code, out, _ = bench(capsys, tflite, "--vs", path, "--queries", 20, "--json")
    row = json.loads(out)["rows"][1]
    assert code == 0
    assert row["runtime"].startswith("onnxruntime ")
    assert (row["accuracy"], row["partitions"], row["outside"]) == (None, None, None)


def write_onnx(onnx, path):
    """`y = x + x` on float32 [batch, 4], the batch open."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, kind, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    opset = helper.make_opsetid("", 13)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


# --- the turns --------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a worker, and notes when it was asked."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def query(self):
        self.log.append(self.name)
        return 1e-3, 1e-3


def test_contestants_take_turns_and_each_begins_as_often():
    log: list[str] = []
    times, _ = measure([Recorder(name, log) for name in "abc"], Extent(queries=6), report=lambda *_: None)
    measured = "".join(log[3 * WARM_UP :])
    assert measured == "abcbcacababcbcacab"
    assert [len(own.wall) for own in times] == [6, 6, 6]


@pytest.mark.parametrize(
    ("queries", "seconds", "extent"),
    [
        (None, None, Extent(queries=FIRST_LOOK)),
        (1024, None, Extent(queries=1024)),
        (None, 60.0, Extent(queries=1, seconds=60.0)),
        (1024, 60.0, Extent(queries=1024, seconds=60.0)),
    ],
)
def test_one_option_alone_decides_alone(queries, seconds, extent):
    assert Extent.of(queries, seconds) == extent


def test_time_is_kept(tflite):
    with Worker(Subject(name="tiny", path=tflite, runtime="tflite")) as worker:
        _, seconds = measure([worker], Extent.of(None, 0.3), report=lambda *_: None)
    assert 0.3 <= seconds < 3


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
@pytest.mark.parametrize("shape", [(), (1, 3), (2, 4, 4, 3)])
def test_random_input_is_as_declared_and_the_same_every_time(dtype, shape):
    first, second = random_samples([("x", shape, dtype)]), random_samples([("x", shape, dtype)])
    for (own,), (other,) in zip(first, second, strict=True):
        assert (own.shape, own.dtype) == (shape, np.dtype(dtype))
        assert (own == other).all()


def test_input_of_another_type_is_refused():
    with pytest.raises(BenchError, match="input ids is int64; random input is drawn for float16, float32, int8, uint8"):
        random_samples([("ids", (1, 8), "int64")])


# --- statistics -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=50), st.floats(0.1, 10))
def test_a_ratio_is_exact_where_one_is_a_multiple_of_the_other(seconds, factor):
    base = np.array(seconds)
    ratio = ratio_of_medians(factor * base, base)
    assert ratio == pytest.approx((factor, factor, factor))


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        machine = np.repeat(rng.lognormal(0, 0.2, 32), 8)  # its speed changes every eight rounds
        base, own = (factor * machine * rng.lognormal(0, 0.1, 256) for factor in (1.0, 1.3))
        ratio = ratio_of_medians(own, base)
        hits += ratio.low <= 1.3 <= ratio.high
        assert ratio.low <= ratio.value <= ratio.high
    assert hits >= 34  # of 40; 38 are expected, fewer than 34 come with a probability below 1 %


def test_percentiles_are_in_milliseconds():
    assert percentiles_ms(np.arange(1, 102) / 1e3) == pytest.approx((51, 91, 100))


def test_a_busy_machine_is_seen():
    idle, busy = (Times(wall=np.full(9, wall), processor=np.full(9, 1e-3)) for wall in (1.1e-3, 1.5e-3))
    assert waiting(idle) < BUSY < waiting(busy)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("INFO: Created delegate.\n", ""),
        ("INFO: x\nTraceback (most recent call last):\n  File ...\nValueError: not a model\n", "not a model"),
        ("Traceback (most recent call last):\n  f()\nRuntimeError: one\ntwo\n", "one two"),
        ("INFO: x\nF0000 check failed\n", "F0000 check failed"),
    ],
)
def test_last_words(log, words):
    assert last_words(log) == words
