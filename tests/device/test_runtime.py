"""Which TFLite runtime a board has, and what it refuses by name before a model is served."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from device.backbone import open_backbone
from device.config import load_config
from device.contract.board import load_board
from device.contract.errors import EngineError, RuntimeMismatchError, UpdateRefusedError
from device.contract.messages import decode_event
from device.engine import Engine
from device.runtime import TFLITE_RUNTIME, runtime_name, tflite_runtime
from device.slots import Slots
from device.updater import Updater
from tests.support.agent import PREFIX, Field
from tests.support.broker import listen, mosquitto
from tests.support.tiny_bundle import NEWER_VERSION, TinyModel, bundle_files, make_manifest

LEGACY = replace(tflite_runtime(), name=TFLITE_RUNTIME, version="2.14.0")
NEWER = rf"{re.escape(runtime_name())} has no operation ADD in version {NEWER_VERSION}"


def is_refusal(payload: bytes) -> bool:
    return decode_event(payload).kind == "refused"


def updater(field: Field) -> Updater:
    return Updater(field.root, load_config(field.root), load_board("generic-x86-64"), Slots(field.root))


def test_the_installed_runtime_is_named():
    runtime = tflite_runtime()
    assert str(runtime) == runtime_name() == f"{runtime.name} {metadata.version(runtime.name)}"


def test_without_a_runtime_each_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    for package in ("ai_edge_litert", "tflite_runtime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=r"ai-edge-litert \(.*tflite-runtime \(.*pip install 'fieldvit\[device\]'"):
        tflite_runtime.__wrapped__()


@pytest.mark.parametrize(
    ("words", "operation"),
    [
        ("Didn't find op for builtin opcode 'ADD' version '99'. An older", "operation ADD in version 99"),
        ("Op builtin_code out of range: 250. Are you using", "operation number 250"),
        ("Encountered unresolved custom op: edgetpu-custom-op.\nSee", "operation edgetpu-custom-op"),
        ("Node number 5 (FlexErf) failed to prepare.", "operation FlexErf"),
        ("The model is not a valid Flatbuffer buffer", ""),
    ],
)
def test_what_a_runtime_lacks_is_read_from_its_words(words: str, operation: str):
    assert tflite_runtime().lacks(words) == operation


def test_a_model_of_a_newer_operation_is_refused_by_its_name(tmp_path: Path, tiny_model: TinyModel):
    (tmp_path / "newer.tflite").write_bytes(tiny_model.newer)
    with pytest.raises(RuntimeMismatchError, match=NEWER):
        Engine(tmp_path / "newer.tflite")


def test_what_tflite_runtime_computes_wrongly_is_refused():
    LEGACY.require_right("int8")
    with pytest.raises(RuntimeMismatchError, match=r"dynamic: tflite-runtime 2\.14\.0 cannot run it: its fully"):
        LEGACY.require_right("dynamic")
    assert LEGACY.refused_precisions == ["dynamic"]


def test_the_next_candidate_takes_the_place_of_one_that_the_runtime_lacks(field: Field, tiny_model: TinyModel):
    field.publish(2, files={"model.int8.tflite": tiny_model.newer})
    staged = updater(field).stage(field.directory / "repo")
    assert (staged.manifest.release, staged.test.precision) == (2, "float32")


def test_a_refusal_holds_until_there_is_another_runtime(
    field: Field, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    newer = {f"model.{precision}.tflite": tiny_model.newer for precision in ("int8", "float32")}
    field.publish(2, files=newer)
    with pytest.raises(UpdateRefusedError, match=NEWER) as refused:
        updater(field).stage(field.directory / "repo")
    assert refused.value.reason == "runtime"
    with pytest.raises(UpdateRefusedError) as again:
        updater(field).stage(field.directory / "repo")
    assert again.value.reason == "rejected-before"
    monkeypatch.setattr("device.updater.runtime_name", lambda: "ai-edge-litert 99.0.0")
    with pytest.raises(UpdateRefusedError) as tried:
        updater(field).stage(field.directory / "repo")
    assert tried.value.reason == "runtime"


def test_the_agent_keeps_its_model_and_reports_the_operation(field: Field, tmp_path: Path, tiny_model: TinyModel):
    field.cli("update")
    field.publish(2, files={f"model.{precision}.tflite": tiny_model.newer for precision in ("int8", "float32")})
    with mosquitto(tmp_path) as port, listen(port, PREFIX) as listener:
        field.configure(port=port, update="check_interval_s = 0.2")
        with field.agent():
            data = decode_event(listener.wait_for("event", is_refusal)).data
        assert (data["reason"], data["release"]) == ("runtime", 2)
        assert "has no operation ADD in version 99" in data["detail"]
        status = json.loads(field.cli("status", "--history", "--json").stdout)
        assert (status["release"], status["history"][-1]["reason"]) == (1, "runtime")


def test_a_precision_that_comes_out_wrong_is_not_loaded(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    files = bundle_files(tiny_model)
    manifest = make_manifest(files)
    artifact = replace(manifest.artifacts[0], precision="dynamic")
    (tmp_path / artifact.path).write_bytes(files[artifact.path])
    load = partial(open_backbone, tmp_path, manifest, artifact, threads=1, delegate="xnnpack")
    if tflite_runtime().name != TFLITE_RUNTIME:
        assert load().path == tmp_path / artifact.path
    monkeypatch.setattr("device.backbone.tflite_runtime", lambda: LEGACY)
    with pytest.raises(RuntimeMismatchError, match="dynamic: tflite-runtime"):
        load()
