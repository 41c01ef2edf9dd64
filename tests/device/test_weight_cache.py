"""Packed weights come from a file that belongs to this very model, and are packed again where it does not."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from device.backbone import open_backbone
from device.cached_engine import KEPT, CachedEngine, cache_path, is_whole
from device.config import RuntimeOverrides, load_config, resolve_runtime
from device.contract.board import load_board
from device.contract.bundle import extract
from device.contract.errors import ArtifactError, EngineError
from device.hand import learn_arguments
from device.infer import infer_files
from device.preprocess import preprocess
from device.runtime import LITERT, tflite_runtime
from device.selftest import SelfTest, run_in_child
from device.selftest import main as selftest
from device.serving import Serving
from device.slots import Slots
from device.updater import Updater
from tests.support.agent import Field
from tests.support.tiny_bundle import (
    LABELS,
    SPEC,
    TinyModel,
    bundle_files,
    make_frames,
    make_manifest,
    write_bundle,
    write_frames,
)

BOARD = load_board("generic-x86-64")
needs_litert = pytest.mark.skipif(tflite_runtime().name != LITERT, reason="only LiteRT has weight caches")


@pytest.fixture
def model_file(tmp_path: Path, tiny_model: TinyModel) -> Path:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_model.tflite)
    return path


def require_right(engine: CachedEngine, model: TinyModel) -> None:
    for frame, expected in zip(model.golden["frames"], model.golden["int8/features"], strict=True):
        np.testing.assert_allclose(engine.features(preprocess(frame[None], SPEC)), expected, atol=1e-5)


@needs_litert
def test_a_cache_is_made_once_and_used_again(model_file: Path, tiny_model: TinyModel, tmp_path: Path):
    cache = cache_path(tmp_path / "cache", "ab")
    require_right(CachedEngine(model_file, cache), tiny_model)
    assert is_whole(cache)
    inode = cache.stat().st_ino
    require_right(CachedEngine(model_file, cache), tiny_model)
    assert cache.stat().st_ino == inode
    assert {path.suffix for path in cache.parent.iterdir()} == {".xnnpack", ".sha256"}


@needs_litert
@pytest.mark.parametrize("damage", ["flip", "cut", "no note", "empty"])
def test_a_damaged_cache_is_made_anew(model_file: Path, tiny_model: TinyModel, tmp_path: Path, damage: str):
    cache = cache_path(tmp_path / "cache", "ab")
    CachedEngine(model_file, cache)
    content, inode = bytearray(cache.read_bytes()), cache.stat().st_ino
    if damage == "flip":
        content[len(content) // 2] ^= 255
    if damage == "no note":
        cache.with_suffix(".sha256").unlink()
    cache.write_bytes({"cut": content[:-100], "empty": b""}.get(damage, content))
    require_right(CachedEngine(model_file, cache), tiny_model)
    assert is_whole(cache)
    assert cache.stat().st_ino != inode


def test_each_model_and_runtime_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = cache_path(tmp_path, "ab")
    assert first == cache_path(tmp_path, "ab")
    assert first != cache_path(tmp_path, "cd")
    monkeypatch.setattr("device.cached_engine.runtime_name", lambda: "ai-edge-litert 99.0.0")
    assert first != cache_path(tmp_path, "ab")


@needs_litert
def test_the_oldest_caches_go(model_file: Path, tmp_path: Path):
    caches = [cache_path(tmp_path / "cache", str(number)) for number in range(KEPT + 1)]
    for cache in caches:
        CachedEngine(model_file, cache)
    assert [is_whole(cache) for cache in caches] == [False, *[True] * KEPT]


@needs_litert
def test_wrong_frames_and_models_are_refused(model_file: Path, tmp_path: Path):
    engine = CachedEngine(model_file, tmp_path / "cache" / "x.xnnpack")
    with pytest.raises(EngineError, match=r"must be float32 \[1, 8, 8, 1\], got float32 \[1, 16, 16, 1\]"):
        engine.features(np.zeros((1, 16, 16, 1), np.float32))
    with pytest.raises(EngineError, match="no weight cache"):
        CachedEngine(tmp_path / "none.tflite", tmp_path / "cache" / "y.xnnpack")


def test_where_there_is_no_cache_the_interpreter_takes_its_place(tmp_path: Path, tiny_model: TinyModel):
    files = bundle_files(tiny_model)
    manifest = make_manifest(files)
    artifact = manifest.artifacts[0]
    (tmp_path / artifact.path).write_bytes(files[artifact.path])
    (tmp_path / "cache").write_text("no directory")
    engine = open_backbone(tmp_path, manifest, artifact, threads=1, delegate="xnnpack", caches=tmp_path / "cache")
    assert "weight cache" in engine.delegate_problem
    require_right(engine, tiny_model)


@needs_litert
def test_what_the_agent_will_serve_with_a_cache_is_tested_with_one(
    field: Field, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    field.configure(runtime="weight_cache = true")
    slots = Slots(field.root)
    slots.recover(is_start=False)
    asked: list[Path] = []

    def spied(slot: Path, precision: str, *, caches: Path, **rest: object) -> SelfTest:
        asked.append(caches)
        return run_in_child(slot, precision, caches=caches, **rest)

    monkeypatch.setattr("device.selftest.run_in_child", spied)
    work = Updater(field.root, load_config(field.root), BOARD, slots)
    staged = work.stage(field.directory / "repo")
    assert staged.test.golden_difference < 1e-4
    assert {*asked} == {field.root / "cache" / "test"}
    arguments = [str(slots.directory(staged.slot)), "--precision", "int8", "--caches", str(asked[0])]
    assert selftest(arguments) == 0
    assert not asked[0].exists()
    monkeypatch.setattr(CachedEngine, "features", lambda engine, _: np.zeros(engine._dim, np.float32))
    assert selftest(arguments) == ArtifactError.exit_code
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # a caller that lives on is not ended later
    assert "golden features differ" in capsys.readouterr().err


def test_tools_beside_the_agent_leave_its_caches_alone(field: Field, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("device.infer.forbidden_modules", list)
    field.configure(runtime="weight_cache = true")
    field.cli("update")
    shutil.rmtree(field.root / "cache", ignore_errors=True)
    write_frames(field.root / "frames", 1, 2)
    config, files = load_config(field.root), [field.root / "frames"]
    assert infer_files(field.root, config, BOARD, files)["results"][0]["label"] == LABELS[2]
    assert len(learn_arguments(field.root, config, BOARD, LABELS[2], files, ())["features"]) == 1
    assert not (field.root / "cache").exists()


@needs_litert
def test_the_agent_serves_with_a_cache_where_it_is_told_to(tmp_path: Path, tiny_model: TinyModel):
    runtime = resolve_runtime(BOARD, RuntimeOverrides(weight_cache=True))
    slots = Slots(tmp_path)
    serving = Serving(slots, runtime)
    for release in (1, 2):
        bundle = write_bundle(tmp_path, tiny_model, release=release)
        entry = slots.stage(f"hash-{release}", lambda slot, bundle=bundle: extract(bundle, slot))
        serving.activate(entry.slot, "int8")
        serving.confirm()
        assert isinstance(serving.model.engine, CachedEngine)
        assert serving.model.infer(make_frames(1, 2)[0])[1].label == LABELS[2]
    assert len(list((tmp_path / "cache").glob("*.xnnpack"))) == 1  # both releases hold the same file
