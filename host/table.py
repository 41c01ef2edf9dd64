"""What verbs print: rows as a table or as JSON on standard output, progress on standard error."""

import json
import sys
from typing import Any


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], as_json: dict[str, Any] | None) -> None:
    """Print rows as a table, or the record in place of it."""
    if as_json is not None:
        print(json.dumps(as_json, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        is_last = index == len(columns) - 1
        table.add_column(column, no_wrap=not is_last, overflow="fold" if is_last else "ellipsis")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def tell_progress(line: str) -> None:
    """Print a line for who waits, beside the result."""
    print(line, file=sys.stderr, flush=True)
