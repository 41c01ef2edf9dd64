"""What `fieldvit models` prints: one line per model, or one model drawn stage by stage.

Whether a model fits a board is what the exporter will demand: room for the smallest artifact that the board runs, by its estimate.
"""

import difflib
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from device.contract.board import Board
from host.errors import ModelError
from host.models.entry import ModelEntry
from host.models.measure import Stage, draw_stages
from host.models.registry import find_model, list_models
from host.stages.budget import int8_bytes, over_budget

NARROW_COLUMNS = 5
"""How many of the columns fit into 80 characters."""


def model_columns(board: Board | None = None) -> tuple[str, ...]:
    """The heads of `model_rows`."""
    of_board = ("int8 MB", "fits") if board else ()
    return ("model", *of_board, "input", "parameters", "MACs", "kind", "task", "paper", "summary")


def model_rows(board: Board | None = None) -> list[tuple[str, ...]]:
    """One row per model; for a board with the estimated size and whether it fits."""
    return [
        (
            entry.name,
            *_board_cells(entry, board),
            _input(entry),
            f"{entry.parameters:,}",
            _macs(entry.macs),
            _kind(entry),
            entry.task,
            entry.paper or "-",
            entry.summary,
        )
        for entry in list_models()
    ]


def model_record(entry: ModelEntry) -> dict[str, Any]:
    """What a script may want to know of a model."""
    return {
        "family": entry.family,
        "variant": entry.variant,
        "task": entry.task,
        "input": [entry.in_chans, entry.image_size, entry.image_size],
        "num_classes": entry.num_classes,
        "parameters": entry.parameters,
        "macs": entry.macs,
        "paper": entry.paper,
        "kind": _kind(entry),
        "timm_name": entry.timm_name or None,
        "summary": entry.summary,
    }


def model_records(board: Board | None = None) -> list[dict[str, Any]]:
    """All models, for scripts; for a board with what `model_rows` adds."""
    return [model_record(entry) | _board_record(entry, board) for entry in list_models()]


def board_note(board: Board) -> str:
    """What the columns of a board mean."""
    budget = f"{board.budget.artifact_bytes / 1e6:.1f} MB"
    return (
        f"{board.name} takes artifacts of up to {budget}; estimated are 1 byte per parameter in int8, 4 in float32, "
        "2 in Core ML"
    )


def show_record(name: str) -> dict[str, Any]:
    """One model with its stages, for scripts."""
    entry = _find(name)
    stages = [
        {
            "name": stage.name,
            "content": stage.content,
            "output": list(stage.output),
            "parameters": stage.parameters,
            "macs": stage.macs,
        }
        for stage in draw_stages(entry)
    ]
    return model_record(entry) | {"stages": stages, "parameters_outside_stages": _outside(entry, draw_stages(entry))}


def show_lines(name: str) -> Iterator[str]:
    """One model drawn from image to logits.

    Raises:
        ModelError: no model of that name.
    """
    entry = _find(name)
    yield f"{entry.name}: {entry.summary}"
    origin = f"a published model, {entry.paper}" if entry.is_exact else f"ours, after {entry.paper or 'no paper'}"
    yield f"{origin}; {entry.num_classes} classes; {entry.parameters:,} parameters, {_macs(entry.macs)} MACs"
    if entry.timm_name:
        yield f"published weights: timm's {entry.timm_name}"
    yield ""
    stages = draw_stages(entry)
    rows = [_draw(run) for run in _runs(stage for stage in stages if stage.parameters)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield f"  {_input(entry):>14}   image"
    for shape, name, content, parameters, macs in rows:
        yield f"  {'|':>14}"
        yield (
            f"  {shape:>14}   {name:{widths[1]}}   {content:{widths[2]}}   {parameters:>{widths[3]}} parameters   "
            f"{macs:>{widths[4]}} MACs"
        )
    outside = _outside(entry, stages)
    if outside:
        yield f"  {'':>14}   and {outside:,} parameters outside of these: positions, tokens"


def _board_cells(entry: ModelEntry, board: Board | None) -> tuple[str, ...]:
    if board is None:
        return ()
    over = over_budget(board, entry.parameters, has_coreml=True)
    return f"{int8_bytes(entry.parameters) / 1e6:.1f}", f"no: {over[0]}" if over else "yes"


def _board_record(entry: ModelEntry, board: Board | None) -> dict[str, Any]:
    if board is None:
        return {}
    over = over_budget(board, entry.parameters, has_coreml=True)
    return {"int8_bytes_estimate": int8_bytes(entry.parameters), "fits": not over, "over_budget": over and over[0]}


def _find(name: str) -> ModelEntry:
    family, slash, variant = name.partition("/")
    if not slash and family not in {entry.family for entry in list_models()}:
        names = [entry.name for entry in list_models()]
        close = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ", as 'fieldvit models' lists them"
        raise ModelError(f"{name!r} is no model name; write FAMILY/VARIANT{hint}")
    return find_model(family, variant)


def _outside(entry: ModelEntry, stages: Iterable[Stage]) -> int:
    """Parameters that belong to no stage, such as position embeddings and tokens."""
    return entry.parameters - sum(stage.parameters for stage in stages)


def _runs(stages: Iterable[Stage]) -> list[list[Stage]]:
    """Consecutive stages that are alike but for their names."""
    return [list(run) for _, run in groupby(stages, key=lambda s: (s.content, s.output, s.parameters, s.macs))]


def _draw(run: list[Stage]) -> tuple[str, ...]:
    """Shape, name, content, parameters and MACs of one line."""
    first, last, count = run[0], run[-1], len(run)
    name = first.name if count == 1 else f"{first.name} to {last.name.rpartition('.')[2]}"
    content = first.content if count == 1 else f"{count} x {first.content}"
    return _shape(first), name, content, f"{count * first.parameters:,}", _macs(count * first.macs)


def _input(entry: ModelEntry) -> str:
    return f"{entry.in_chans} x {entry.image_size} x {entry.image_size}"


def _shape(stage: Stage) -> str:
    return " x ".join(map(str, stage.output))


def _macs(macs: int) -> str:
    return f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"


def _kind(entry: ModelEntry) -> str:
    return "exact" if entry.is_exact else "ours"
