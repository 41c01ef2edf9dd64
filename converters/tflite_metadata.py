"""Standard TFLite Metadata: what an image classifier takes and gives, for tools that know nothing of FieldViT.

The format is that of the public schema `metadata_schema.fbs` (identifier M001, Apache-2.0), whose own writer has no
wheels for current Python: a flatbuffer in the metadata buffer `TFLITE_METADATA`, and the files that it names as a zip
behind the model. Android's and MediaPipe's libraries read it.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import ConversionError
from converters.metadata_schema import Content
from device.contract.manifest import InputSpec

BUFFER_NAME = "TFLITE_METADATA"
LABELS_FILE = "labels.txt"
_PARSER_VERSION = "1.0.0"
"""Of the schema in which every field that we write was there."""
_COLOR_SPACES = {"rgb": "RGB", "gray": "GRAYSCALE"}
_ANY_SCORE = -3.0e38
"""The task library drops scores below 0 unless the model says otherwise, and logits may all be."""
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a person wants to know of a model; what is empty is left out."""

    name: str = ""
    version: str = ""
    description: str = ""
    author: str = ""
    licence: str = ""


def classifier_metadata(about: About, spec: InputSpec | None, *, has_labels: bool) -> dict[str, Any]:
    """The content for a model with one image in and one row of logits out.

    The standard normalizes pixels of 0..255, our specification those of 0..1: mean and deviation are scaled.

    Raises:
        ConversionError: the colour order is not one that the standard knows.
    """
    subgraph = {
        "name": "classifier",
        "input_tensor_metadata": [_image(spec) if spec else {"name": "images"}],
        "output_tensor_metadata": [_logits(has_labels)],
    }
    return _without_empty(
        {
            "name": about.name,
            "description": about.description,
            "version": about.version,
            "subgraph_metadata": [subgraph],
            "author": about.author,
            "license": about.licence,
            "min_parser_version": _PARSER_VERSION,
        }
    )


def append_files(model: bytes, files: Mapping[str, bytes]) -> bytes:
    """Put files behind a model as a stored zip with fixed times; a model without any stays as it is."""
    if not files:
        return model
    buffer = io.BytesIO(model)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, _ZIP_TIME)
            info.create_system, info.external_attr = 3, 0o100644 << 16  # else those of the machine that writes
            archive.writestr(info, content)
    return buffer.getvalue()


def _image(spec: InputSpec) -> dict[str, Any]:
    if spec.color_order not in _COLOR_SPACES:
        raise ConversionError(
            f"input: colour order {spec.color_order!r} has no name in TFLite Metadata; use {' or '.join(_COLOR_SPACES)}"
        )
    mean, std = [255 * value for value in spec.mean], [255 * value for value in spec.std]
    size = {"width": spec.width, "height": spec.height}
    return {
        "name": "images",
        "description": f"One image of {spec.height} x {spec.width} pixels, normalized.",
        "content": {
            "content_properties_type": "ImageProperties",
            "content_properties": {"color_space": _COLOR_SPACES[spec.color_order], "default_size": size},
        },
        "process_units": [{"options_type": "NormalizationOptions", "options": {"mean": mean, "std": std}}],
        "stats": {
            "max": [(255 - m) / s for m, s in zip(mean, std, strict=True)],
            "min": [-m / s for m, s in zip(mean, std, strict=True)],
        },
    }


def _logits(has_labels: bool) -> dict[str, Any]:
    file = {"name": LABELS_FILE, "description": "One label a line, in order.", "type": "TENSOR_AXIS_LABELS"}
    threshold = {"global_score_threshold": _ANY_SCORE}
    return _without_empty(
        {
            "name": "logits",
            "description": "One score per class; their softmax is a probability.",
            "content": {"content_properties_type": "FeatureProperties", "content_properties": {}},
            "process_units": [{"options_type": "ScoreThresholdingOptions", "options": threshold}],
            "associated_files": [file] if has_labels else [],
        }
    )


def _without_empty(content: Content) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value not in ("", [])}
