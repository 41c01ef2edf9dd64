"""What `fieldvit models` prints: one line per model, or one model drawn stage by stage."""

from collections.abc import Iterator
from typing import Any

from host.errors import ModelError
from host.models.entry import ModelEntry
from host.models.measure import Stage, draw_stages
from host.models.registry import find_model, list_models

COLUMNS = ("model", "task", "input", "parameters", "MACs", "source", "", "summary")


def model_rows() -> list[tuple[str, ...]]:
    """One row per model, under `COLUMNS`."""
    return [
        (
            entry.name,
            entry.task,
            _input(entry),
            f"{entry.parameters:,}",
            _macs(entry.macs),
            entry.paper or "–",
            _kind(entry),
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


def model_records() -> list[dict[str, Any]]:
    """All models, for scripts."""
    return [model_record(entry) for entry in list_models()]


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
    return model_record(entry) | {"stages": stages}


def show_lines(name: str) -> Iterator[str]:
    """One model drawn from image to logits.

    Raises:
        ModelError: no model of that name.
    """
    entry = _find(name)
    yield f"{entry.name}: {entry.summary}"
    yield f"{_kind(entry)}, {entry.paper or 'no paper'}; {entry.parameters:,} parameters, {_macs(entry.macs)} MACs"
    yield ""
    stages = draw_stages(entry)
    names = max(len(stage.name) for stage in stages)
    contents = max(len(stage.content) for stage in stages)
    yield f"  {_input(entry):>14}   image"
    for stage in stages:
        yield f"  {'│':>14}"
        yield f"  {_shape(stage):>14}   {stage.name:{names}}   {stage.content:{contents}}   {_cost(stage)}".rstrip()


def _find(name: str) -> ModelEntry:
    family, slash, variant = name.partition("/")
    if not slash or not variant:
        raise ModelError(f"{name!r} is no model name; write FAMILY/VARIANT, as 'fieldvit models' lists them")
    return find_model(family, variant)


def _input(entry: ModelEntry) -> str:
    return f"{entry.in_chans} x {entry.image_size} x {entry.image_size}"


def _shape(stage: Stage) -> str:
    return " x ".join(map(str, stage.output))


def _cost(stage: Stage) -> str:
    return f"{stage.parameters:>11,} parameters   {_macs(stage.macs):>7} MACs" if stage.parameters else ""


def _macs(macs: int) -> str:
    return f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"


def _kind(entry: ModelEntry) -> str:
    return "exact" if entry.is_exact else "ours"
