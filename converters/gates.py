"""What a TFLite file must prove before it is shipped: built-in operations, a head that learns, few partitions."""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from converters import flatbuffer
from converters.errors import ConversionError, ParityError, UnsupportedOpError
from converters.head import PADDING_LABEL, empty_head, train_step

HEAD_SIGNATURES = ("infer_f", "train_f")


def assert_builtin_ops(path: Path) -> None:
    """Refuse Flex, custom and StableHLO operations: a plain interpreter on a phone or an older board has none of them.

    Raises:
        UnsupportedOpError: names the signature and its operations.
    """
    for signature, names in flatbuffer.operators(path).items():
        foreign = sorted(name for name in names if not _is_builtin(name))
        if foreign:
            raise UnsupportedOpError(
                f"{path}: signature {signature} uses {', '.join(foreign)}, which plain LiteRT cannot run; "
                "rewrite the layer"
            )


def assert_head_is_float(path: Path) -> None:
    """Refuse a file whose head was quantized: it would run, and never learn.

    Raises:
        ConversionError: a head signature is missing or has tensors other than float32, int32 and bool.
    """
    types = flatbuffer.tensor_types(path)
    for signature in HEAD_SIGNATURES:
        if signature not in types:
            raise ConversionError(
                f"{path}: has no signature {signature}, only {', '.join(sorted(types))}; export it again"
            )
        odd = types[signature].keys() - {"FLOAT32", "INT32", "BOOL"}
        if odd:
            raise ConversionError(
                f"{path}: signature {signature} holds {', '.join(sorted(odd))} tensors; it would not learn"
            )


def check_train_signature(path: Path, *, steps: int = 20, tolerance: float = 1e-4) -> list[float]:
    """Train the head for some steps in LiteRT and in NumPy: the loss must fall and both must agree.

    One class is left untaught and one row is padding, as on a board that learns its first classes.

    Returns:
        The loss before each step.

    Raises:
        ConversionError: the head is not float32, or does not learn.
        ParityError: LiteRT and NumPy part by more than the tolerance.
    """
    from device.engine import Engine

    assert_head_is_float(path)
    engine = Engine(path)
    batch, dim = engine.input_shape("train_f", "f")
    _, num_classes = engine.input_shape("train_f", "W")
    features, labels = _clusters(batch, dim, num_classes - 1)
    weight, bias = empty_head(dim, num_classes)
    bias[:-1] = 0.0
    twin, losses = (weight, bias), []
    learning_rate = np.ones(1, np.float32)
    for step in range(steps):
        out = engine.run("train_f", f=features, y=labels, W=weight, b=bias, lr=learning_rate)
        loss, *twin = train_step(features, labels, *twin, learning_rate=1.0)
        weight, bias = out["W_new"], out["b_new"]
        losses.append(float(out["loss"][0]))
        difference = max(abs(losses[-1] - loss), np.abs(weight - twin[0]).max(), np.abs(bias - twin[1]).max())
        if not difference <= tolerance:
            raise ParityError(
                f"{path}: train_f differs from NumPy by {difference:.3g} at step {step}; allowed {tolerance:.3g}"
            )
    if not losses[-1] < 0.9 * losses[0]:
        raise ConversionError(
            f"{path}: {steps} steps of train_f moved the loss from {losses[0]:.4f} to {losses[-1]:.4f}; "
            "it does not learn"
        )
    _check_inference(engine, path, features[:1], weight, bias, tolerance)
    return losses


def partitions(path: Path) -> tuple[int, Counter[str]]:
    """How XNNPACK splits the `features` graph on this machine: number of partitions, and the operations left outside.

    Uses LiteRT's private operation list, so it is for reports and tests; nothing on a board depends on it.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    plan = interpreter._get_ops_details()  # before allocation: the file's own operations
    interpreter.allocate_tensors()  # the delegate is applied here and appended to the list
    delegates = [op for op in interpreter._get_ops_details() if op["op_name"] == "DELEGATE"]
    producers = {int(tensor): op for op in plan for tensor in op["outputs"]}
    inside: set[int] = set()
    for delegate in delegates:  # walk back from the partition's outputs to its inputs
        stop, todo = set(map(int, delegate["inputs"])), list(map(int, delegate["outputs"]))
        while todo:
            tensor = todo.pop()
            if tensor not in stop and tensor in producers and producers[tensor]["index"] not in inside:
                inside.add(producers[tensor]["index"])
                todo += [int(source) for source in producers[tensor]["inputs"]]
    return len(delegates), Counter(op["op_name"] for op in plan if op["index"] not in inside)


def _is_builtin(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Z0-9_]+", name)) and name != "CUSTOM" and not name.startswith("STABLEHLO_")


def _clusters(batch: int, dim: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit feature vectors [B, D] around one centre per class, and labels [B]; the last of several rows is padding."""
    rng = np.random.default_rng(0)
    labels = (np.arange(batch) % num_classes).astype(np.int32)
    centres = rng.standard_normal((num_classes, dim))
    features = centres[labels] + 0.1 * rng.standard_normal((batch, dim))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    if batch > 1:
        labels[-1], features[-1] = PADDING_LABEL, 0.0
    return features.astype(np.float32), labels


def _check_inference(
    engine, path: Path, features: np.ndarray, weight: np.ndarray, bias: np.ndarray, tolerance: float
) -> None:  # type: ignore[no-untyped-def]
    logits = engine.run("infer_f", f=features, W=weight, b=bias)["logits"]
    difference = np.abs(logits - (features @ weight + bias)).max()
    if not difference <= tolerance * max(1.0, np.abs(bias).max()):
        raise ParityError(f"{path}: infer_f differs from NumPy by {difference:.3g}; allowed {tolerance:.3g}")
