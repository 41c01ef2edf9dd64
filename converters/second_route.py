"""PyTorch to TFLite by a second route that shares nothing with the first: ONNX, then onnx2tf and TensorFlow's converter.

litert-torch (`converters.tflite`) is the main route: it takes seconds and our own environment. This one takes a minute, and
2.6 GB in an environment of its own (`make onnx2tf-env`), where a child process does the work. It is there for what the
first refuses, and to ask whether two converters that know nothing of each other make the same of a model.

onnx2tf: Katsuya Hyodo, https://github.com/PINTO0309/onnx2tf, MIT.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from converters import flatbuffer, onnx2tf_child
from converters.environments import ONNX2TF
from converters.errors import ConversionError, RefusedModelError
from converters.gates import assert_builtin_ops
from converters.onnx_export import FEATURES, LOGITS, export_onnx
from converters.prepare import feature_dim
from device.contract.files import write_atomic

TIMEOUT_S = 3600
"""The slowest full-size model so far, EfficientFormer-L1, takes four minutes."""
_LAST_LINES = 400
"""Characters of what the child said, where nothing in it looks like an error."""


def convert_backbone(model: nn.Module, input_shape: tuple[int, int, int, int], path: Path) -> Path:
    """Write the float32 backbone: signature `features`, images [1, H, W, C] to features [1, D].

    Args:
        model: a model's `deploy()`.
        input_shape: (1, H, W, C).
        path: where to write.

    Raises:
        MissingEnvironmentError: `make onnx2tf-env` was not run.
        RefusedModelError: one of the converters does not take the model.
        UnsupportedOpError: the file that came out needs more than LiteRT's built-in operations.
        ConversionError: the model does not fit, or the file has other shapes than it.
    """
    return _convert(model, input_shape, path, signature=flatbuffer.FEATURES, with_logits=False)


def convert_classifier(model: nn.Module, input_shape: tuple[int, int, int, int], path: Path) -> Path:
    """The same with the head: signature `serving_default`, images to `features` [1, D] and `logits` [1, K]."""
    return _convert(model, input_shape, path, signature=flatbuffer.INFER, with_logits=True)


def _convert(
    model: nn.Module, input_shape: tuple[int, int, int, int], path: Path, *, signature: str, with_logits: bool
) -> Path:
    python = ONNX2TF.require()
    dim = feature_dim(model, input_shape)
    with tempfile.TemporaryDirectory(prefix="fieldvit-onnx2tf-") as temporary:
        directory = Path(temporary)
        onnx_path = export_onnx(model, input_shape, directory / "model.onnx", with_logits=with_logits)
        found = directory / "model.tflite"
        _run_child(python, onnx_path, found, signature, type(model).__name__)
        assert_builtin_ops(found)
        require_shapes(found, signature, {"images": input_shape, FEATURES: (1, dim)}, with_logits=with_logits)
        write_atomic(path, found.read_bytes())
    return path


def _run_child(python: Path, onnx_path: Path, path: Path, signature: str, name: str) -> None:
    work = path.parent / "work"
    work.mkdir()
    try:
        done = subprocess.run(
            # -I: neither our PYTHONPATH nor the folder of the script, whose modules have names of other packages
            [str(python), "-I", onnx2tf_child.__file__, str(onnx_path), str(path), signature],
            cwd=work,
            env=_environment(python),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RefusedModelError(f"onnx2tf worked on {name} for {TIMEOUT_S} s and was stopped") from error
    except OSError as error:
        raise ConversionError(f"{python} cannot be started ({error}); run: make {ONNX2TF.target}") from error
    if done.returncode or not path.exists():
        raise RefusedModelError(f"onnx2tf cannot convert {name}: {cause_of(done.returncode, done.stdout)}")


def _environment(python: Path) -> dict[str, str]:
    """Ours, with the commands of the child's environment first: onnx2tf calls `onnxsim` by its name."""
    return os.environ | {
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def cause_of(code: int, said: str) -> str:
    """What an onnx2tf run that failed has to say, in one line: the error, and the operation where it names one."""
    if code < 0:
        return f"its process ended with signal {-code}"
    said = re.sub(r"\x1b\[[0-9;]*m", "", said)
    errors = re.findall(r"^(?:\w+\.)*(?:\w*Error|\w*Exception): .*(?:\n.*Flex ops: .*)?", said, re.MULTILINE)
    operation = re.search(r"onnx_op_name: *(\S+)", said)
    cause = errors[-1] if errors else said.strip()[-_LAST_LINES:] or f"exit code {code}"
    place = f"at {operation[1]}: " if operation else ""
    return place + " ".join(cause.split())


def require_shapes(path: Path, signature: str, shapes: Mapping[str, tuple[int, ...]], *, with_logits: bool) -> None:
    """Refuse a file whose axes the converter has exchanged: it would run, on other frames."""
    model = flatbuffer.read_model(path)
    definition, graph = flatbuffer.definition(model, signature), flatbuffer.subgraph_of(model, signature)
    found = {
        entry.name.decode(): tuple(int(size) for size in graph.tensors[entry.tensorIndex].shape)
        for entry in [*definition.inputs, *definition.outputs]
    }
    wanted = {*shapes, LOGITS} if with_logits else {*shapes}
    if found.keys() != wanted or any(found[name] != shape for name, shape in shapes.items()):
        raise ConversionError(f"onnx2tf gave {found}, expected {dict(shapes)}; this model needs the first route")
