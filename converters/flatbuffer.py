"""Surgery on TFLite files: metadata, a baked head, and the identity of one signature's graph.

Works on the object form that ai-edge-litert's own `flatbuffer_utils` reads and writes, so no schema is copied here.
Packing is deterministic: the same objects give the same bytes in every process.
"""

import copy
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import metadata_schema, tflite_metadata
from converters.errors import ConversionError
from converters.tflite_metadata import About
from device.contract.files import write_atomic
from device.contract.manifest import InputSpec
from device.contract.records import from_table

INPUT_METADATA = "fieldvit.input"
FEATURES = "features"
INFER = "serving_default"


def read_model(path: Path) -> Any:
    """Read a TFLite file into its object form (`schema_py_generated.ModelT`), buffers as uint8 arrays."""
    from ai_edge_litert.tools import flatbuffer_utils

    try:
        model = flatbuffer_utils.read_model(str(path))
    except (OSError, ValueError, TypeError, IndexError, struct.error) as error:
        raise ConversionError(f"{path}: not a readable TFLite file ({error}); export it again") from error
    for buffer in model.buffers:
        if buffer.data is not None:  # large ones come as bytes, which would be packed one byte at a time
            buffer.data = np.frombuffer(bytes(buffer.data), np.uint8)
    return model


def write_model(model: Any, path: Path, *, files: Mapping[str, bytes] | None = None) -> None:
    """Write the object form as a TFLite file, with associated files behind it."""
    from ai_edge_litert.tools import flatbuffer_utils

    content = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    write_atomic(path, tflite_metadata.append_files(content, files or {}))


def add_metadata(model: Any, entries: Mapping[str, Any]) -> None:
    """Store each value in a metadata buffer of that name, replacing an older one: bytes as they are, others as JSON."""
    from ai_edge_litert import schema_py_generated as schema

    kept = [entry for entry in model.metadata or [] if entry.name.decode() not in entries]
    for name in sorted(entries):
        value = entries[name]
        content = value if isinstance(value, bytes) else canonical_json(value)
        buffer = schema.BufferT(data=np.frombuffer(content, np.uint8))
        kept.append(schema.MetadataT(name=name.encode(), buffer=len(model.buffers)))
        model.buffers.append(buffer)
    model.metadata = kept
    _drop_unused(model)


def read_metadata(path: Path, name: str = INPUT_METADATA) -> Any:
    """Read one JSON metadata entry back; None where the file has none of that name."""
    content = _metadata(read_model(path), name)
    return None if content is None else json.loads(content)


def read_standard_metadata(path: Path) -> dict[str, Any] | None:
    """Read the standard TFLite Metadata, in the form that `flatc --json` prints; None where the file has none.

    Raises:
        ConversionError: it is damaged.
    """
    content = _metadata(read_model(path), tflite_metadata.BUFFER_NAME)
    return None if content is None else metadata_schema.unpack(content)


def bake_head(
    path: Path,
    weight: np.ndarray,
    bias: np.ndarray,
    out_path: Path,
    *,
    labels: tuple[str, ...] = (),
    about: About = About(),  # noqa: B008 (frozen)
) -> Path:
    """Write `image -> logits` with a fixed float32 head, from the very backbone of a FieldViT TFLite file.

    The backbone is copied operation by operation, float or int8 as it is, so this file answers exactly as the board
    does and costs no second conversion. Its only signature is `serving_default`: input `images`, output `logits`. It
    describes itself by standard TFLite Metadata; labels are in a zip behind the model.

    Args:
        path: a file that `convert_float` or a quantizer of this package wrote.
        weight: float32 [D, K], as `infer_f` takes it.
        bias: float32 [K].
        out_path: where to write.
        labels: stored as metadata `fieldvit.labels`, and as the associated file `labels.txt`.
        about: what people want to know of the model.

    Raises:
        ConversionError: the head does not fit the backbone.
    """
    model = read_model(path)
    _isolate(model, FEATURES)
    _append_linear(model, np.asarray(weight, np.float32), np.asarray(bias, np.float32))
    if labels:
        add_metadata(model, {"fieldvit.labels": list(labels)})
    _describe(model, about, has_labels=bool(labels))
    files = {tflite_metadata.LABELS_FILE: "".join(f"{label}\n" for label in labels).encode()} if labels else {}
    write_model(model, out_path, files=files)
    return out_path


def backbone(model: Any) -> Any:
    """Leave nothing in a model but the graph from images to features, or to logits, and return that graph.

    Raises:
        ConversionError: it has neither a signature `features` nor `serving_default`.
    """
    names = {definition.signatureKey.decode() for definition in model.signatureDefs or []}
    _isolate(model, INFER if INFER in names and FEATURES not in names else FEATURES)
    _drop_unused(model)
    return model.subgraphs[0]


def operators(path: Path) -> dict[str, Counter[str]]:
    """Count the operation names of each signature; a custom operation is named by its custom code."""
    model = read_model(path)
    return {
        definition.signatureKey.decode(): Counter(
            operator_name(model, operator) for operator in model.subgraphs[definition.subgraphIndex].operators
        )
        for definition in model.signatureDefs or []
    }


def tensor_types(path: Path) -> dict[str, Counter[str]]:
    """Count the element types of each signature's tensors, for example `{"features": {"INT8": 80, "FLOAT32": 12}}`."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = read_model(path)
    return {
        definition.signatureKey.decode(): Counter(
            flatbuffer_utils.type_to_name(tensor.type) for tensor in model.subgraphs[definition.subgraphIndex].tensors
        )
        for definition in model.signatureDefs or []
    }


def graph_digest(path: Path, signature: str) -> str:
    """SHA-256 over one signature's operations, their options, and its tensors' types, scales and contents.

    Names, other signatures and metadata do not count, so relabelling or another head leaves it as it is.
    """
    model = read_model(path)
    graph = subgraph_of(model, signature)
    record = {
        "inputs": _plain(graph.inputs),
        "outputs": _plain(graph.outputs),
        "tensors": [_tensor_record(model, tensor) for tensor in graph.tensors],
        "operators": [_operator_record(model, operator) for operator in graph.operators],
    }
    return hashlib.sha256(canonical_json(record)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _metadata(model: Any, name: str) -> bytes | None:
    for entry in model.metadata or []:
        if entry.name.decode() == name:
            return bytes(model.buffers[entry.buffer].data)
    return None


def _describe(model: Any, about: About, *, has_labels: bool) -> None:
    """Add the standard metadata, from our own record of the input where the file has one."""
    record = _metadata(model, INPUT_METADATA)
    spec = (
        from_table(InputSpec, json.loads(record), where=INPUT_METADATA, error=ConversionError)
        if record is not None
        else None
    )
    content = tflite_metadata.classifier_metadata(about, spec, has_labels=has_labels)
    add_metadata(model, {tflite_metadata.BUFFER_NAME: metadata_schema.pack(content)})


def definition(model: Any, signature: str) -> Any:
    """The definition of one signature, which names its graph.

    Raises:
        ConversionError: the file has no such signature.
    """
    for found in model.signatureDefs or []:
        if found.signatureKey.decode() == signature:
            return found
    known = ", ".join(sorted(definition.signatureKey.decode() for definition in model.signatureDefs or [])) or "none"
    raise ConversionError(
        f"TFLite file has no signature {signature!r}, it has: {known}; export it with 'fieldvit export'"
    )


def subgraph_of(model: Any, signature: str) -> Any:
    """The graph of a signature.

    Raises:
        ConversionError: there is no such signature.
    """
    return model.subgraphs[definition(model, signature).subgraphIndex]


def _isolate(model: Any, signature: str) -> None:
    kept = definition(model, signature)
    model.subgraphs = [model.subgraphs[kept.subgraphIndex]]
    kept.subgraphIndex = 0
    model.signatureDefs = [kept]


def _append_linear(model: Any, weight: np.ndarray, bias: np.ndarray) -> None:
    from ai_edge_litert import schema_py_generated as schema

    graph, (signature,) = model.subgraphs[0], model.signatureDefs
    (features,) = graph.outputs
    dim = int(graph.tensors[features].shape[-1])
    if weight.ndim != 2 or weight.shape[0] != dim or bias.shape != weight.shape[1:]:
        raise ConversionError(
            f"head weight {list(weight.shape)} and bias {list(bias.shape)} do not fit a backbone of {dim} features; "
            f"give [{dim}, K] and [K]"
        )
    if graph.tensors[features].type != schema.TensorType.FLOAT32:
        raise ConversionError("the features output must be float32 to carry a float head; quantize with this package")

    def add_tensor(name: str, shape: list[int], content: np.ndarray | None) -> int:
        buffer = 0
        if content is not None:
            model.buffers.append(schema.BufferT(data=np.frombuffer(content.astype("<f4").tobytes(), np.uint8)))
            buffer = len(model.buffers) - 1
        graph.tensors.append(
            schema.TensorT(shape=shape, type=schema.TensorType.FLOAT32, buffer=buffer, name=name.encode())
        )
        return len(graph.tensors) - 1

    classes = weight.shape[1]
    inputs = [
        features,
        add_tensor("head_weight", [classes, dim], np.ascontiguousarray(weight.T)),
        add_tensor("head_bias", [classes], bias),
    ]
    output = add_tensor("logits", [1, classes], None)
    code = schema.BuiltinOperator.FULLY_CONNECTED
    model.operatorCodes.append(schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=1))
    graph.operators.append(
        schema.OperatorT(
            opcodeIndex=len(model.operatorCodes) - 1,
            inputs=inputs,
            outputs=[output],
            builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions,
            builtinOptions=schema.FullyConnectedOptionsT(),
        )
    )
    graph.name, graph.outputs = INFER.encode(), [output]
    signature.signatureKey = INFER.encode()
    (signature.outputs[0].name, signature.outputs[0].tensorIndex) = (b"logits", output)


def _drop_unused(model: Any) -> None:
    """Remove operator codes and buffers that nothing refers to any more; buffer 0 stays the empty one."""
    codes = sorted({operator.opcodeIndex for graph in model.subgraphs for operator in graph.operators})
    for graph in model.subgraphs:
        for operator in graph.operators:
            operator.opcodeIndex = codes.index(operator.opcodeIndex)
    model.operatorCodes = [model.operatorCodes[code] for code in codes]
    holders = [tensor for graph in model.subgraphs for tensor in graph.tensors] + list(model.metadata or [])
    kept = sorted({0, *(holder.buffer for holder in holders)})
    position = {buffer: index for index, buffer in enumerate(kept)}
    for holder in holders:
        holder.buffer = position[holder.buffer]
    model.buffers = [copy.copy(model.buffers[buffer]) for buffer in kept]


def operator_name(model: Any, operator: Any) -> str:
    """The operation's name in the schema; a custom operation's own."""
    from ai_edge_litert.tools import flatbuffer_utils

    code = model.operatorCodes[operator.opcodeIndex]
    if code.customCode:
        return str(code.customCode.decode())
    names = {value: name for name, value in vars(flatbuffer_utils.BuiltinOperator).items() if isinstance(value, int)}
    return names[flatbuffer_utils.get_builtin_code_from_operator_code(code)]


def _operator_record(model: Any, operator: Any) -> dict[str, Any]:
    return {
        "name": operator_name(model, operator),
        "inputs": _plain(operator.inputs),
        "outputs": _plain(operator.outputs),
        "options": _plain(operator.builtinOptions),
        "options2": _plain(operator.builtinOptions2),
    }


def _tensor_record(model: Any, tensor: Any) -> dict[str, Any]:
    quantization, data = tensor.quantization, model.buffers[tensor.buffer].data
    return {
        "type": tensor.type,
        "shape": _plain(tensor.shape),
        "scale": _plain(quantization.scale) if quantization else None,
        "zero_point": _plain(quantization.zeroPoint) if quantization else None,
        "axis": quantization.quantizedDimension if quantization else None,
        "content": None if data is None else hashlib.sha256(data.tobytes()).hexdigest(),
    }


def _plain(value: Any) -> Any:
    """Turn schema objects and arrays into JSON values, without fields at their default: new ones change nothing."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "__dict__"):
        return {name: _plain(item) for name, item in vars(value).items() if item not in (None, 0, False, 0.0)}
    return value
