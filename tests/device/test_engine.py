"""The engine runs a real model, and refuses what LiteRT would accept silently."""

import threading
from pathlib import Path

import numpy as np
import pytest

from device.contract.errors import EngineError
from device.engine import Engine
from device.preprocess import preprocess
from tests.support.tiny_bundle import SPEC, TinyModel, make_frames


@pytest.fixture
def engine(tmp_path: Path, tiny_model: TinyModel) -> Engine:
    (tmp_path / "tiny.tflite").write_bytes(tiny_model.tflite)
    return Engine(tmp_path / "tiny.tflite")


def test_signatures_and_golden_features(engine: Engine, tiny_model: TinyModel):
    assert engine.signatures == ["features", "infer_f"]
    assert engine.feature_dim == 16
    frame = preprocess(tiny_model.golden["frames"][:1], SPEC)
    np.testing.assert_allclose(engine.features(frame), tiny_model.golden["int8/features"][0], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16, 16, 1), (2, 8, 8, 1), (8, 8, 1), (1, 8, 8, 3)])
def test_wrong_shapes_are_refused(engine: Engine, shape: tuple[int, ...]):
    with pytest.raises(EngineError, match=r"must be float32 \[1, 8, 8, 1\]"):
        engine.features(np.zeros(shape, np.float32))


def test_wrong_dtype_names_and_signatures_are_refused(engine: Engine):
    with pytest.raises(EngineError, match="must be float32"):
        engine.features(np.zeros((1, 8, 8, 1)))
    with pytest.raises(EngineError, match="inputs must be"):
        engine.run("features", nonsense=np.zeros(1))
    with pytest.raises(EngineError, match="no signature 'train'; it has features, infer_f"):
        engine.run("train")


def test_outputs_are_copies(engine: Engine):
    first = engine.features(preprocess(make_frames(1, 0), SPEC))
    kept = first.copy()
    engine.features(preprocess(make_frames(1, 3), SPEC))
    np.testing.assert_array_equal(first, kept)


def test_threads_share_an_engine_safely(engine: Engine):
    frames = [preprocess(make_frames(1, k), SPEC) for k in range(4)]
    expected = [engine.features(frame) for frame in frames]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(200):
            if not np.array_equal(engine.features(frames[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("content", [None, b"", b"TFL3", b"\0" * 1000])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "bad.tflite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match="install a sound bundle"):
        Engine(path)
