"""Write what a benchmark measured: `bench/results/NAME.json` for programs, `NAME.md` with the same rows for readers.

Both files come from one call, so a table in the documentation cannot say something that was not measured. Each says on
which machine; it never says the machine's name, its user or a path.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from host.machine import describe_machine

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, Any]


def write_results(
    name: str,
    *,
    command: str,
    seed: int | None,
    data: str,
    rows: Sequence[Row],
    title: str,
    notes: str = "",
    directory: Path = RESULTS,
    machine: Mapping[str, Any] | None = None,
    today: Callable[[], date] = lambda: datetime.now(UTC).date(),
) -> Path:
    """Write `NAME.json` and `NAME.md`, each whole or not at all; returns the path of the table.

    Args:
        name: file name without ending: lower-case letters, digits, `_` and `-`.
        command: what a reader types to measure again.
        seed: the seed of the run; None where nothing is drawn.
        data: what was measured on, in words.
        rows: one mapping per row, of strings, finite numbers, booleans and None. Columns appear in the order in which
            the rows first name them; units are part of their names.
        title: heading of the table.
        notes: paragraphs below the table, in Markdown: what was not reached, what it does not say.
        directory: where to; for tests.
        machine: what was measured on where it is not this machine (a board over ssh).
        today: the clock; for tests.

    Raises:
        ValueError: the name has other characters, there are no rows, or a row holds NaN, infinity or another type.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"name of results must be lower-case letters, digits, _ and -, got {name!r}")
    if not rows:
        raise ValueError(f"results {name!r} have no rows; a benchmark that measured nothing must fail instead")
    record = {
        "command": command,
        "machine": dict(machine or describe_machine()),
        "date": today().isoformat(),
        "seed": seed,
        "data": data,
        "rows": [{column: _scalar(value, f"{name}: {column}") for column, value in row.items()} for row in rows],
    }
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / f"{name}.json", json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _replace(directory / f"{name}.md", _markdown(record, title=title, notes=notes))
    return directory / f"{name}.md"


def _scalar(value: Any, where: str) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy and torch scalars
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; leave the cell None and say in the notes why there is no figure")
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where} must be a string, number, boolean or None, got {type(value).__name__}")
    return value


def _markdown(record: Mapping[str, Any], *, title: str, notes: str) -> str:
    columns = list(dict.fromkeys(column for row in record["rows"] for column in row))
    table = [columns, ["---"] * len(columns), *([_cell(row.get(c)) for c in columns] for row in record["rows"])]
    machine = record["machine"]
    where = ", ".join(f"{machine[key]}" if key in ("cpu", "os") else f"{key} {machine[key]}" for key in machine)
    seed = f"seed {record['seed']}"
    if record["seed"] is None:
        seed = "seeds as in the rows" if "seed" in columns else "no seed"
    parts = [
        f"# {title}",
        "\n".join(f"| {' | '.join(line)} |" for line in table),
        f"Measured {record['date']} by `{record['command']}`, {seed}. Data: {record['data']}. Machine: {where}.",
        notes.strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
