"""A delegate runs the model where it can; where it cannot, the processor does, and the agent says why."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device.config import AgentConfig, RuntimeOverrides, resolve_runtime
from device.contract.board import LIBRARIES, load_board
from device.contract.errors import ConfigError
from device.contract.messages import decode_event, decode_state
from device.engine import Engine
from device.preprocess import preprocess
from tests.support.agent import PREFIX, Field
from tests.support.broker import Listener, listen, mosquitto
from tests.support.delegates import times_prepared
from tests.support.tiny_bundle import SPEC, TinyModel

BOARD = load_board("generic-x86-64")


@pytest.fixture
def model_file(tmp_path: Path, tiny_model: TinyModel) -> Path:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tiny_model.tflite)
    return path


def require_right(engine: Engine, model: TinyModel) -> None:
    features = engine.features(preprocess(model.golden["frames"][:1], SPEC))
    np.testing.assert_allclose(features, model.golden["int8/features"][0], atol=1e-5)


def test_a_delegate_is_asked(model_file: Path, tiny_model: TinyModel, delegate_library: Callable[..., Path]):
    library = delegate_library()
    engine = Engine(model_file, delegate=str(library))
    assert (engine.delegate, engine.delegate_problem) == (str(library), "")
    assert times_prepared(library) >= 1
    require_right(engine, tiny_model)


@pytest.mark.parametrize("delegate", sorted(LIBRARIES))
def test_a_missing_library_leaves_the_processor(model_file: Path, tiny_model: TinyModel, delegate: str):
    engine = Engine(model_file, delegate=delegate)
    assert engine.delegate == "xnnpack"
    assert engine.delegate_problem.startswith(f"delegate {delegate}: {LIBRARIES[delegate]}: cannot open shared object")
    assert engine.delegate_problem.endswith(f"install {LIBRARIES[delegate]}")
    require_right(engine, tiny_model)


def test_a_library_that_is_no_delegate(model_file: Path, tiny_model: TinyModel):
    engine = Engine(model_file, delegate="libm.so.6")
    assert engine.delegate_problem == (
        "delegate libm.so.6: libm.so.6 is no TFLite delegate, it has no tflite_plugin_create_delegate"
    )
    require_right(engine, tiny_model)


@pytest.mark.parametrize(
    ("changes", "reason"), [({"prepare_status": 1}, "delegate"), ({"has_device": False}, "no device is connected")]
)
def test_a_delegate_that_refuses(
    model_file: Path, tiny_model: TinyModel, delegate_library: Callable[..., Path], changes: dict[str, int], reason: str
):
    library = delegate_library(**changes)
    engine = Engine(model_file, delegate=str(library))
    assert engine.delegate == "xnnpack"
    assert reason in engine.delegate_problem
    assert str(library) in engine.delegate_problem
    require_right(engine, tiny_model)


def test_the_board_profile_and_agent_toml_choose():
    assert BOARD.runtime.delegate == "xnnpack"
    assert resolve_runtime(BOARD, RuntimeOverrides(delegate="edgetpu")).delegate == "edgetpu"
    assert resolve_runtime(BOARD, RuntimeOverrides(delegate="/opt/libx.so.2")).delegate == "/opt/libx.so.2"
    config = AgentConfig(site="s", device="d", board=BOARD.name, runtime=RuntimeOverrides(delegate="tpu"))
    with pytest.raises(ConfigError, match=r"runtime\.delegate must be xnnpack, coreml, edgetpu, .* got 'tpu'"):
        resolve_runtime(BOARD, config.runtime)


@pytest.mark.parametrize("is_there", [True, False])
def test_the_agent_says_what_runs_its_model(
    field: Field, tmp_path: Path, delegate_library: Callable[..., Path], is_there: bool
):
    library = delegate_library(has_device=is_there)
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        field.configure(port=port, runtime=f'delegate = "{library}"\nsoak_frames = 5\nsoak_s = 0.2\n')
        with field.agent():
            require_named(field, listener, str(library), is_there=is_there)


def require_named(field: Field, listener: Listener, library: str, *, is_there: bool) -> None:
    birth = decode_state(listener.wait_for("state", lambda payload: decode_state(payload).model is not None))
    assert birth.delegate == (library if is_there else "xnnpack")
    if not is_there:
        event = listener.wait_for("event", lambda payload: decode_event(payload).kind == "error")
        data = decode_event(event).data
        assert (data["reason"], "no device is connected" in data["detail"]) == ("delegate", True)
    status = json.loads(field.cli("status", "--json").stdout)
    assert (status["delegate"], status["delegate_fallbacks"]) == (birth.delegate, int(not is_there))
    assert ("no device is connected" in status["delegate_problem"]) is not is_there
    assert status["runtime"] == birth.runtime
    assert json.loads(field.cli("selftest", "--json").stdout)["delegate"] == birth.delegate
