"""Flatbuffers of the public schema `metadata_schema.fbs` of TFLite Metadata (identifier M001), packed and unpacked.

`_TABLES` restates the part of the schema that we write: fields in their order, up to the last that is needed. Packing
and unpacking both follow it, and the unpacked form is what `flatc --json` prints. Equal contents give equal bytes.
"""

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import flatbuffers
from flatbuffers import encode, number_types, packer
from flatbuffers.table import Table

from converters.errors import ConversionError

Content = Mapping[str, Any]
_IDENTIFIER = b"M001"


class _Enum(NamedTuple):
    names: tuple[str, ...]


class _Union(NamedTuple):
    """Takes two fields: the number of the table, whose first is 1, and the table."""

    tables: tuple[str, ...]


class _Vector(NamedTuple):
    of: str


_COLOR_SPACE = _Enum(("UNKNOWN", "RGB", "GRAYSCALE"))
_FILE_TYPE = _Enum(
    (
        "UNKNOWN",
        "DESCRIPTIONS",
        "TENSOR_AXIS_LABELS",
        "TENSOR_VALUE_LABELS",
        "TENSOR_AXIS_SCORE_CALIBRATION",
        "VOCABULARY",
        "SCANN_INDEX_FILE",
    )
)

_TRANSFORMATION = _Enum(("IDENTITY", "LOG", "INVERSE_LOGISTIC"))

# A type is "string", "float", "uint", the name of a table, or one of the above.
_TABLES: dict[str, dict[str, Any]] = {
    "ModelMetadata": {
        "name": "string",
        "description": "string",
        "version": "string",
        "subgraph_metadata": _Vector("SubGraphMetadata"),
        "author": "string",
        "license": "string",
        "associated_files": _Vector("AssociatedFile"),
        "min_parser_version": "string",
    },
    "SubGraphMetadata": {
        "name": "string",
        "description": "string",
        "input_tensor_metadata": _Vector("TensorMetadata"),
        "output_tensor_metadata": _Vector("TensorMetadata"),
    },
    "TensorMetadata": {
        "name": "string",
        "description": "string",
        "dimension_names": _Vector("string"),
        "content": "Content",
        "process_units": _Vector("ProcessUnit"),
        "stats": "Stats",
        "associated_files": _Vector("AssociatedFile"),
    },
    "Content": {"content_properties": _Union(("FeatureProperties", "ImageProperties"))},
    "FeatureProperties": {},
    "ImageProperties": {"color_space": _COLOR_SPACE, "default_size": "ImageSize"},
    "ImageSize": {"width": "uint", "height": "uint"},
    "ProcessUnit": {"options": _Union(("NormalizationOptions", "ScoreCalibrationOptions", "ScoreThresholdingOptions"))},
    "NormalizationOptions": {"mean": _Vector("float"), "std": _Vector("float")},
    "ScoreCalibrationOptions": {"score_transformation": _TRANSFORMATION, "default_score": "float"},
    "ScoreThresholdingOptions": {"global_score_threshold": "float"},
    "Stats": {"max": _Vector("float"), "min": _Vector("float")},
    "AssociatedFile": {"name": "string", "description": "string", "type": _FILE_TYPE},
}


def pack(content: Content) -> bytes:
    """Write a `ModelMetadata` flatbuffer."""
    builder = flatbuffers.Builder()
    builder.Finish(_pack_table(builder, "ModelMetadata", content), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def unpack(data: bytes) -> dict[str, Any]:
    """Read a `ModelMetadata` flatbuffer; fields and unions that `_TABLES` does not know are passed over.

    Raises:
        ConversionError: it is none.
    """
    if data[4:8] != _IDENTIFIER:
        raise ConversionError(
            f"TFLite Metadata has identifier {data[4:8]!r}, not {_IDENTIFIER!r}; export the file again"
        )
    try:
        root = encode.Get(packer.uoffset, data, 0)
        return _unpack_table(Table(data, root), "ModelMetadata")
    except (struct.error, IndexError, TypeError, UnicodeDecodeError) as error:  # TypeError: an offset out of range
        raise ConversionError(f"TFLite Metadata is damaged ({error}); export the file again") from error


def _slots(table: str) -> dict[str, int]:
    """The first slot of each field."""
    slots, next_slot = {}, 0
    for name, kind in _TABLES[table].items():
        slots[name] = next_slot
        next_slot += 2 if isinstance(kind, _Union) else 1
    return slots


def _pack_table(builder: flatbuffers.Builder, table: str, content: Content) -> int:
    """Children first, as a flatbuffer wants it; returns the table's offset."""
    kinds, slots = _TABLES[table], _slots(table)
    packed = {name: _pack_child(builder, kind, name, content) for name, kind in kinds.items() if name in content}
    builder.StartObject(sum(2 if isinstance(kind, _Union) else 1 for kind in kinds.values()))
    for name, value in packed.items():
        kind, slot = kinds[name], slots[name]
        if isinstance(kind, _Enum):
            builder.PrependInt8Slot(slot, value, 0)
        elif kind == "uint":
            builder.PrependUint32Slot(slot, value, 0)
        elif kind == "float":
            builder.PrependFloat32Slot(slot, value, 0.0)
        else:
            if isinstance(kind, _Union):
                builder.PrependUint8Slot(slot, 1 + kind.tables.index(content[f"{name}_type"]), 0)
                slot += 1
            builder.PrependUOffsetTRelativeSlot(slot, value, 0)
    return int(builder.EndObject())


def _pack_child(builder: flatbuffers.Builder, kind: Any, name: str, content: Content) -> int | float:
    """The number of a scalar, or the offset of what lies outside of the table."""
    value = content[name]
    if isinstance(kind, _Enum):
        return kind.names.index(value)
    if isinstance(kind, _Union):
        return _pack_table(builder, content[f"{name}_type"], value)
    if isinstance(kind, _Vector):
        return _pack_vector(builder, kind.of, value)
    if kind == "string":
        return int(builder.CreateString(value))
    return value if kind in ("uint", "float") else _pack_table(builder, kind, value)


def _pack_vector(builder: flatbuffers.Builder, kind: str, values: list[Any]) -> int:
    packed = [_pack_child(builder, kind, "of", {"of": value}) for value in values]
    builder.StartVector(4, len(packed), 4)
    for value in reversed(packed):
        if kind == "float":
            builder.PrependFloat32(value)
        else:
            builder.PrependUOffsetTRelative(value)
    return int(builder.EndVector())


def _unpack_table(table: Table, name: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for field, slot in _slots(name).items():
        kind = _TABLES[name][field]
        place = int(table.Offset(4 + 2 * slot))
        if isinstance(kind, _Union) and place:
            number = table.Get(number_types.Uint8Flags, table.Pos + place)
            if number > len(kind.tables):
                continue
            content[f"{field}_type"] = kind = kind.tables[number - 1]
            place = int(table.Offset(4 + 2 * (slot + 1)))
        if place:
            content[field] = _unpack_value(table, kind, table.Pos + place)
    return content


def _unpack_value(table: Table, kind: Any, position: int) -> Any:
    """The value at an absolute position."""
    if isinstance(kind, _Enum):
        return kind.names[table.Get(number_types.Int8Flags, position)]
    if isinstance(kind, _Vector):
        start, count = table.Vector(position - table.Pos), table.VectorLen(position - table.Pos)
        return [_unpack_value(table, kind.of, start + 4 * index) for index in range(count)]
    if kind == "float":
        return float(table.Get(number_types.Float32Flags, position))
    if kind == "uint":
        return int(table.Get(number_types.Uint32Flags, position))
    if kind == "string":
        return table.String(position).decode()
    return _unpack_table(Table(table.Bytes, table.Indirect(position)), kind)
