"""What `fieldvit verify --layers` shows: the worst tensors, the first that departs, a drawing of errors along the depth."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converters.layers import Layer, LayerReport
from device.contract.files import write_atomic
from host.bundle_checks import VerifyReport
from host.quantize.spec import FLOAT

LAYER_COLUMNS = ("artifact", "error", "1 - cosine", "own / allowed", "operation", "module")
WORST = 5
_NOT_COMPARED = "its tensors were compared with nothing, the run that made it is not at hand (--runs)"


def layer_rows(reports: Sequence[LayerReport]) -> list[tuple[str, ...]]:
    """The worst tensors of each artifact, for the table."""
    return [_row(report.artifact, layer) for report in reports for layer in report.worst(WORST)]


def layer_summary(report: VerifyReport) -> list[str]:
    """One line per artifact."""
    lines = [_summary(found) for found in report.layers]
    if FLOAT not in {found.artifact for found in report.layers}:
        lines.append(f"{FLOAT}: {_NOT_COMPARED}")
    compared = {found.artifact for found in report.layers}
    missing = [check.artifact for check in report.checks if check.artifact.startswith("coreml")]
    return lines + [f"{name}: {_NOT_COMPARED}" for name in missing if name not in compared]


def layer_record(reports: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """The same for `--json`, with every tensor."""
    return [asdict(report) | {"first_departed": _name(report.first_departed)} for report in reports]


def draw_layers(reports: Sequence[LayerReport], bundle: Path, directory: Path) -> Path:
    """Write `BUNDLE.layers.svg` into a directory; returns its path."""
    from host.report.charts import error_along_depth

    errors = {report.artifact: [layer.error for layer in report.layers] for report in reports}
    departed = {
        report.artifact: (report.layers.index(layer), layer.place) if (layer := report.first_departed) else None
        for report in reports
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{bundle.stem}.layers.svg"
    write_atomic(path, error_along_depth(errors, departed).encode())
    return path


def _row(artifact: str, layer: Layer) -> tuple[str, ...]:
    figures = (f"{layer.error:.2e}", f"{layer.cosine_distance:.2e}", f"{layer.own:.2f}")
    return (artifact, *figures, layer.kind, layer.place)


def _summary(report: LayerReport) -> str:
    layer = report.first_departed
    if layer is None:
        return f"{report.artifact}: no tensor departs from {report.reference}"
    return f"{report.artifact}: departs first at {layer.place}, {layer.kind} {layer.name}"


def _name(layer: Layer | None) -> str | None:
    return layer.name if layer else None
